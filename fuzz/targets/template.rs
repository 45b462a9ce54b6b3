//! Any text as a chat template: the characters of a message never become part of a control token.
//!
//! The messages consist of characters that no other text here has, and the added tokens are made of those characters,
//! with all flags. So every added token that is found is a defect.
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::files::gguf::Gguf;
use candle_phi::text::chat::{Message, Template};
use candle_phi::text::tokenizer::{Special, Tokenizer};
use libfuzzer_sys::fuzz_target;
use scratch::{Scratch, check_message, sound};

static SOUND: LazyLock<(Gguf, Arc<Tokenizer>)> = LazyLock::new(sound);
/// SPM and byte-level.
static TOKENIZERS: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| [SPM, BYTE_LEVEL].map(tokenizer));

/// Without case, and not ASCII: nothing turns another character into one of these.
const OWN: [char; 3] = ['氷', '雪', '川'];
/// Added tokens of those characters alone, and ones that the text of a template may complete.
const ADDED: [&str; 12] =
    ["氷", "雪川", "<氷", "氷>", "<|氷|>", "<雪", "川|>", "氷 ", " 川", "雪\n川", "氷雪川氷", "{川}"];
const FIRST_ID: u32 = 30;

const SPM: &str = r#"{"added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,"vocab":{"<unk>":0,"▁":1,"h":2,"e":3,"he":6},"merges":["h e"]}}"#;
const BYTE_LEVEL: &str = r#"{"added_tokens":[],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"Ġ":3},"merges":["a b"]}}"#;

fn tokenizer(json: &str) -> Tokenizer {
    let added: Vec<String> = ADDED
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let flag = |bit: usize| i >> bit & 1 == 1;
            format!(
                r#"{{"id":{},"content":{text:?},"special":true,"single_word":{},"lstrip":{},"rstrip":{},"normalized":{}}}"#,
                FIRST_ID as usize + i,
                i == 6,
                flag(0),
                flag(1),
                flag(2)
            )
        })
        .collect();
    let json = json.replace(r#""added_tokens":[]"#, &format!(r#""added_tokens":[{}]"#, added.join(",")));
    let file = Scratch::new("own.json");
    file.write(json.as_bytes());
    let tokenizer = Tokenizer::from_json(&file.path, &SOUND.0).expect("a sound tokenizer");
    std::fs::remove_file(&file.path).expect("our own file");
    tokenizer
}

// The first character says which conversation it is.
fuzz_target!(|input: &str| {
    // An escape could spell a character of the messages.
    if input.contains(OWN) || input.contains('\\') {
        return;
    }
    let (gguf, tokenizer) = &*SOUND;
    let roles = match input.bytes().next() {
        Some(b's') => &["system", "user", "assistant", "user"][..],
        Some(b'a') => &["user", "assistant"],
        Some(b'r') => &["氷", "user"],
        Some(b'0') => &[],
        _ => &["user"],
    };
    let contents = ["氷雪川 氷\n川", "氷", "雪\n川氷雪川氷", "川"];
    let messages: Vec<Message> = roles
        .iter()
        .zip(contents)
        .map(|(&role, content)| Message { role: role.into(), content: content.into() })
        .collect();
    let rendered = Template::new(Some(input), gguf, tokenizer.clone()).and_then(|template| template.render(&messages));
    match rendered {
        Ok(rendered) => {
            assert!(rendered.text.len() <= 8 << 20);
            assert!(rendered.user.is_sorted_by(|a, b| a.end < b.start));
            for range in &rendered.user {
                assert!(!rendered.text[range.clone()].is_empty());
            }
            for (at, c) in rendered.text.match_indices(OWN) {
                let next = rendered.user.partition_point(|range| range.end <= at);
                assert!(
                    rendered.user.get(next).is_some_and(|range| range.start <= at),
                    "{c} at {at}: {:?}",
                    rendered.user
                );
            }
            for tokenizer in &*TOKENIZERS {
                let ids = tokenizer.encode(&rendered.text, Special::Outside(&rendered.user)).expect("ids");
                assert!(ids.iter().all(|&id| id < FIRST_ID), "{ids:?} of {rendered:?}");
            }
        }
        Err(error) => check_message(&error),
    }
});
