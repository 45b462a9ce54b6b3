//! Byte-level BPE over the real vocabularies below Phi-4 (cl100k) and Phi-4-mini (o200k), against tiktoken.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::{Family, Special, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tiktoken_rs::CoreBPE;

use super::texts::{Random, texts};
use super::vocabulary::*;

/// GPT-2's table, by its definition: printable Latin-1 as it is, the rest counted up from U+0100.
pub fn char_of(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte.into();
    }
    let n = (0..byte).filter(|&other| !printable(other)).count();
    char::from_u32(256 + n as u32).expect("a character")
}

/// What tiktoken has of a vocabulary: the bytes of each id, which is its rank.
struct Ranks {
    tokens: Vec<Vec<u8>>,
    ids: HashMap<Vec<u8>, usize>,
}

impl Ranks {
    fn of(bpe: &CoreBPE, n: usize) -> Self {
        let tokens: Vec<Vec<u8>> = (0..n).map(|id| bpe.decode_bytes(&[id as u32]).expect("a token")).collect();
        let ids = tokens.iter().cloned().enumerate().map(|(id, token)| (token, id)).collect();
        Self { tokens, ids }
    }

    /// The two tokens that became this one: what BPE makes of its bytes with the merges before it.
    fn parts(&self, id: usize) -> Option<(&[u8], &[u8])> {
        let token = &self.tokens[id];
        let mut cuts: Vec<usize> = (0..=token.len()).collect();
        while cuts.len() > 3 {
            let rank = |i: &usize| self.ids.get(&token[cuts[i - 1]..cuts[i + 1]]).filter(|&&rank| rank < id);
            let (_, i) = (1..cuts.len() - 1).filter_map(|i| Some((rank(&i)?, i))).min()?;
            cuts.remove(i);
        }
        (cuts.len() == 3).then(|| token.split_at(cuts[1]))
    }
}

fn spelled(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char_of).collect()
}

/// The vocabulary as a GGUF file has it: `n` tokens, of which `added` have their own texts and the rest is padding.
fn vocabulary(ranks: &Ranks, pre: &str, added: &[(u32, String)], n: usize) -> Vocabulary {
    let mut vocabulary = Vocabulary { model: Some("gpt2".into()), pre: Some(pre.into()), ..Vocabulary::default() };
    let added: HashMap<u32, &String> = added.iter().map(|(id, text)| (*id, text)).collect();
    for id in 0..n {
        match (added.get(&(id as u32)), ranks.tokens.get(id)) {
            (Some(text), _) => vocabulary.push(text, CONTROL, 0.0),
            (None, Some(token)) => vocabulary.push(&spelled(token), NORMAL, 0.0),
            (None, None) => vocabulary.push(&format!("[PAD{id}]"), 5, 0.0),
        }
    }
    let parts = (0..ranks.tokens.len()).filter_map(|id| ranks.parts(id));
    vocabulary.merges = Some(parts.map(|(left, right)| format!("{} {}", spelled(left), spelled(right))).collect());
    vocabulary.scores = None;
    vocabulary
}

fn load(vocabulary: &Vocabulary) -> Arc<Tokenizer> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = vocabulary.save(folder.path()).path().to_owned();
    let start = Instant::now();
    let gguf = Gguf::open(&path, true).unwrap();
    let opened = start.elapsed();
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf).unwrap());
    println!("file opened in {opened:?}, tokenizer built in {:?}", start.elapsed() - opened);
    tokenizer
}

fn compare(tokenizer: &Arc<Tokenizer>, tiktoken: &CoreBPE, ranks: &Ranks, added: &[(u32, String)]) {
    let pieces: Vec<&str> = ranks.tokens.iter().filter_map(|token| std::str::from_utf8(token).ok()).collect();
    for piece in &pieces {
        let ids = tokenizer.encode(piece, Special::None).unwrap();
        assert_eq!(ids, tiktoken.encode_ordinary(piece), "{piece:?}");
    }
    let names: Vec<&str> = added.iter().map(|(_, text)| text.as_str()).collect();
    for text in texts(20, 6000, &pieces, &names) {
        let ids = tokenizer.encode(&text, Special::None).unwrap();
        assert_eq!(ids, tiktoken.encode_ordinary(&text), "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert_eq!(stream(tokenizer, &ids, false).concat(), text);
        assert!(!tokenizer.strips_leading_space_after(&ids));
    }
    // Any ids at all: what is shown is what the bytes say.
    let mut random = Random::new(21);
    for _ in 0..3000 {
        let ids: Vec<u32> = (0..1 + random.below(8)).map(|_| random.below(ranks.tokens.len()) as u32).collect();
        let text = String::from_utf8_lossy(&tiktoken.decode_bytes(&ids).unwrap()).into_owned();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{ids:?}");
        let shown = stream(tokenizer, &ids, false).concat();
        assert!(shown == text || text == shown + "\u{fffd}", "{ids:?}");
    }
}

#[test]
fn phi4() {
    let tiktoken = tiktoken_rs::cl100k_base().unwrap();
    let ranks = Ranks::of(&tiktoken, 100_256);
    let name = |id| match id {
        100_257 => "<|endoftext|>".to_owned(),
        100_264 => "<|im_start|>".to_owned(),
        100_265 => "<|im_end|>".to_owned(),
        100_266 => "<|im_sep|>".to_owned(),
        id => format!("<|dummy_{id}|>"),
    };
    let added: Vec<(u32, String)> = (100_256..100_352).map(|id| (id, name(id))).collect();
    let mut vocabulary = vocabulary(&ranks, "dbrx", &added, 100_352);
    vocabulary.ids = vec![("bos", 100_257), ("eos", 100_257)];
    assert_eq!(vocabulary.merges.as_ref().unwrap().len(), 100_000);
    let ours = load(&vocabulary);
    assert_eq!((ours.family(), ours.n_vocab(), ours.bos_id()), (Family::Phi4, 100_352, Some(100_257)));
    assert_eq!(ours.stop_ids(), [100_257, 100_265]);
    compare(&ours, &tiktoken, &ranks, &added);

    // Every added token takes the whitespace on both sides.
    let prompt = "<|im_start|>user<|im_sep|> \n\u{a0}Hi there \n <|im_end|>\n<|im_start|>assistant<|im_sep|>";
    let text = |text: &str| tiktoken.encode_ordinary(text);
    let expected = [
        &[100_264],
        &text("user")[..],
        &[100_266],
        &text("Hi there"),
        &[100_265, 100_264],
        &text("assistant"),
        &[100_266],
    ];
    let ids = ours.encode(prompt, Special::All).unwrap();
    assert_eq!(ids, expected.concat());
    assert_eq!(ours.decode(&ids, true).unwrap(), "userHi thereassistant");
    assert!(!ours.strips_leading_space_after(&ids));
}

#[test]
fn phi4_mini() {
    let tiktoken = tiktoken_rs::o200k_base().unwrap();
    let ranks = Ranks::of(&tiktoken, 199_998);
    let names = [
        "endofprompt",
        "assistant",
        "end",
        "user",
        "system",
        "tool",
        "/tool",
        "tool_call",
        "/tool_call",
        "tool_response",
        "tag",
    ];
    let mut added = vec![(199_999, "<|endoftext|>".to_owned())];
    added.extend((200_018..).zip(names).map(|(id, name)| (id, format!("<|{name}|>"))));
    let mut vocabulary = vocabulary(&ranks, "gpt-4o", &added, 200_064);
    vocabulary.ids = vec![("bos", 199_999), ("eos", 199_999)];
    let ours = load(&vocabulary);
    assert_eq!((ours.family(), ours.n_vocab(), ours.bos_id()), (Family::Phi4Mini, 200_064, Some(199_999)));
    assert_eq!(ours.stop_ids(), [199_999, 200_020]);
    compare(&ours, &tiktoken, &ranks, &added);

    let text = |text: &str| tiktoken.encode_ordinary(text);
    let ids = ours.encode("<|user|>\n Hi \n<|end|>\n<|assistant|><|endoftext|>\n", Special::All).unwrap();
    let expected = [&[200_021], &text("Hi \n")[..], &[200_020, 200_019, 199_999], &text("\n")];
    assert_eq!(ids, expected.concat());
    let special: Vec<u32> = (0..200_064).filter(|&id| ours.is_special(id)).collect();
    assert_eq!(special, [199_999, 200_018, 200_019, 200_020, 200_021, 200_022, 200_028]);
    assert!((200_023..=200_027).all(|id| ours.is_added(id)));
}

/// A vocabulary in which control tokens are ordinary entries too, as converters write it: whole words are looked up in
/// it, and merges lead there.
#[test]
fn a_json_does_not_lead_from_text_to_control_tokens() {
    let mut vocab: serde_json::Map<String, Value> = (0..=255).map(|b| (char_of(b).to_string(), json!(b))).collect();
    let pieces = ["<|", "|>", "en", "end", "<|end", "<|end|>", "<|im_start|>", "Ġa", "ab"];
    vocab.extend(pieces.into_iter().zip(256..).map(|(piece, id)| (piece.to_owned(), json!(id))));
    let token = |content: &str| {
        json!({"id": vocab[content], "content": content, "special": true, "normalized": false,
                                       "single_word": false, "lstrip": false, "rstrip": true})
    };
    let merges = ["< |", "| >", "e n", "en d", "<| end", "<|end |>", "Ġ a", "a b"];
    let json = json!({
        "version": "1.0", "normalizer": null, "post_processor": null, "padding": null, "truncation": null,
        "added_tokens": [token("<|end|>"), token("<|im_start|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "fuse_unk": false,
                  "end_of_word_suffix": "", "byte_fallback": false, "ignore_merges": true, "vocab": vocab, "merges": merges},
    });
    let mut gguf = small();
    gguf.ids = vec![("eos", 262)];
    let ours = from_json(&json, &gguf).unwrap();
    let reference = Reference::new(&json);
    for text in texts(22, 2000, &["<|end", "end", "ab", " a"], &["<|end|>", "<|im_start|>"]) {
        let ids = ours.encode(&text, Special::All).unwrap();
        assert_eq!(ids, reference.encode(&text), "{text:?}");
        assert_eq!(ours.decode(&ids, true).unwrap(), reference.decode(&ids, true));
        let spelled = ours.encode(&text, Special::None).unwrap();
        assert!(spelled.iter().all(|&id| !ours.is_added(id)), "{text:?}");
        assert_eq!(ours.decode(&spelled, true).unwrap(), text);
    }
    assert_eq!(ours.encode("<|end|>", Special::Outside(std::slice::from_ref(&(0..7)))).unwrap(), [260, 257]);
    assert_eq!((ours.family(), ours.stop_ids()), (Family::Phi4, &[261, 262][..]));
    // A match that a user's text would complete is spelled out as one text.
    for range in [0..1, 1..6, 6..7, 3..4] {
        let ids = ours.encode("<|end|>ab", Special::Outside(std::slice::from_ref(&range))).unwrap();
        assert_eq!(ids, ours.encode("<|end|>ab", Special::None).unwrap(), "{range:?}");
    }

    let mut truncating = json.clone();
    truncating["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    truncating["model"]["dropout"] = json!(1.0);
    let whole = from_json(&truncating, &gguf).unwrap().encode("abababab", Special::All).unwrap();
    assert_eq!(whole, [264; 4], "truncation and dropout are for training");
}
