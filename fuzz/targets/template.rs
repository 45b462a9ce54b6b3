//! Any text as a chat template, over a short conversation.
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::chat::{Message, Template};
use candle_phi::gguf::Gguf;
use candle_phi::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use scratch::{check_message, sound};

static SOUND: LazyLock<(Gguf, Arc<Tokenizer>)> = LazyLock::new(sound);

// The first character says which conversation it is.
fuzz_target!(|input: &str| {
    let (gguf, tokenizer) = &*SOUND;
    let roles = match input.bytes().next() {
        Some(b's') => &["system", "user", "assistant", "user"][..],
        Some(b'a') => &["user", "assistant"],
        Some(b'0') => &[],
        _ => &["user"],
    };
    let content = |role: &str| format!(" {role} <|end|>\n");
    let messages: Vec<Message> =
        roles.iter().map(|&role| Message { role: role.into(), content: content(role) }).collect();
    let rendered = Template::new(Some(input), gguf, tokenizer.clone()).and_then(|template| template.render(&messages));
    match rendered {
        Ok(rendered) => {
            assert!(rendered.text.len() <= 8 << 20);
            assert!(rendered.literal.is_sorted());
            assert!(rendered.literal.iter().all(|&at| rendered.text.as_bytes()[at] == b'<'));
        }
        Err(error) => check_message(&error),
    }
});
