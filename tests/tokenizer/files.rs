//! Wrong files, and what a user reads about them.
use candle_phi::error::Error;
use candle_phi::gguf::Gguf;
use candle_phi::tokenizer::{Special, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::texts::Random;
use super::vocabulary::*;

/// The message, which names `words`.
fn invalid(vocabulary: &Vocabulary, words: &[&str]) {
    match vocabulary.load() {
        Err(Error::InvalidModel(message)) => {
            let words = [&["vocabulary.gguf"], words].concat();
            assert!(words.iter().all(|word| message.contains(word)), "{message} names {words:?}");
        }
        other => panic!("{words:?}: {:?}", other.map(|_| "a tokenizer")),
    }
}

#[test]
fn arrays_that_contradict_each_other() {
    type Change = fn(&mut Vocabulary);
    let cases: [(Change, &[&str]); 14] = [
        (|v| v.model = None, &["tokenizer.ggml.model", "missing"]),
        (|v| v.tokens = None, &["tokenizer.ggml.tokens", "missing"]),
        (|v| v.scores = None, &["tokenizer.ggml.scores", "missing"]),
        (|v| v.types = None, &["tokenizer.ggml.token_type", "missing"]),
        (|v| v.scores.as_mut().unwrap().truncate(7), &["tokenizer.ggml.scores", "7 "]),
        (|v| v.types.as_mut().unwrap().push(1), &["tokenizer.ggml.token_type"]),
        (|v| v.scores.as_mut().unwrap()[270] = f32::NAN, &["tokenizer.ggml.scores", "270"]),
        (|v| v.tokens.as_mut().unwrap()[260] = b"\xff".into(), &["tokenizer.ggml.tokens", "260", "UTF-8"]),
        (|v| v.tokens.as_mut().unwrap()[13] = b"x!".into(), &["tokenizer.ggml.tokens", "<0x0A>"]),
        (|v| v.tokens.as_mut().unwrap()[400] = vec![b'a'; 2_000_000], &["tokenizer.ggml.tokens", "400", "2000000"]),
        (|v| v.ids = vec![("bos", 99_999)], &["tokenizer.ggml.bos_token_id", "99999"]),
        (|v| v.ids = vec![("eot", u32::MAX)], &["tokenizer.ggml.eot_token_id", "4294967295"]),
        (|v| v.ids = vec![("unknown", 5000)], &["tokenizer.ggml.unknown_token_id", "5000"]),
        (|v| v.rows = Some(100), &["token_embd.weight", "100 rows"]),
    ];
    for (change, words) in cases {
        let mut vocabulary = small();
        change(&mut vocabulary);
        invalid(&vocabulary, words);
    }
}

#[test]
fn kinds_that_are_not_of_this_family() {
    for (model, pre, key) in [("t5", None, "model"), ("bert", None, "model"), ("gpt2", Some("qwen2"), "pre")] {
        let mut vocabulary = small();
        (vocabulary.model, vocabulary.pre) = (Some(model.into()), pre.map(String::from));
        let Err(Error::UnsupportedModel(message)) = vocabulary.load() else { panic!("{model} {pre:?}") };
        assert!(
            message.contains(&format!("tokenizer.ggml.{key}")) && message.contains(pre.unwrap_or(model)),
            "{message}"
        );
    }
}

#[test]
fn merges_that_cannot_be() {
    let mut vocabulary = byte_vocabulary();
    vocabulary.merges = None;
    invalid(&vocabulary, &["tokenizer.ggml.merges", "missing"]);
    for (merge, words) in [
        ("ab", &["merge 1", "ab"][..]),
        ("a b c", &["merge 1", "a b c"]),
        ("a zz", &["merge 1", "\"zz\""]),
        ("b a", &["merge 1", "\"ba\""]),
        ("<|endoftext|> <|endoftext|>", &["merge 1", "<|endoftext|>"]), // longer than any token
    ] {
        vocabulary.merges = Some(vec!["a b".into(), merge.into()]);
        invalid(&vocabulary, words);
    }
    vocabulary.merges = Some(vec!["a b".into()]);
    vocabulary.tokens.as_mut().unwrap()[0] = b"x!".into(); // the space
    invalid(&vocabulary, &["tokenizer.ggml.tokens", "0x00"]);
}

/// The 256 bytes, "ab" and `<|endoftext|>`.
fn byte_vocabulary() -> Vocabulary {
    let mut vocabulary = Vocabulary { model: Some("gpt2".into()), pre: Some("dbrx".into()), ..Vocabulary::default() };
    for byte in 0..=255 {
        vocabulary.push(&super::byte_level::char_of(byte).to_string(), NORMAL, 0.0);
    }
    vocabulary.push("ab", NORMAL, 0.0);
    vocabulary.push("<|endoftext|>", CONTROL, 0.0);
    vocabulary.merges = Some(vec!["a b".into()]);
    vocabulary
}

#[test]
fn a_sound_byte_vocabulary_needs_no_scores() {
    let mut vocabulary = byte_vocabulary();
    vocabulary.scores = None;
    vocabulary.ids = vec![("unknown", 256)]; // an ordinary token, as in Phi-4's files
    let tokenizer = vocabulary.load().unwrap();
    assert_eq!(tokenizer.encode("ab<|endoftext|>b", Special::All).unwrap(), [256, 257, u32::from(b'b')]);
    assert!(!tokenizer.is_special(256));
}

#[test]
fn a_tokenizer_json_that_is_none() {
    let vocabulary = small();
    let folder = TempDir::new().unwrap();
    let gguf = vocabulary.save(folder.path());
    let load = |content: &[u8]| {
        let path = super::gguf_writer::save(folder.path(), "tokenizer.json", content);
        Tokenizer::from_json(&path, &gguf)
    };
    let missing = Tokenizer::from_json(&folder.path().join("no.json"), &gguf).unwrap_err();
    assert!(matches!(&missing, Error::ModelNotFound(message) if message.contains("no.json")), "{missing}");
    let is_folder = Tokenizer::from_json(folder.path(), &gguf).unwrap_err();
    assert!(matches!(is_folder, Error::InvalidModel(_)), "{is_folder}");
    for content in
        [&b""[..], b"{", b"[]", b"3", b"<!DOCTYPE html>", b"\xff\xfe", b"{}", b"{\"model\": 3}", b"{\"a\":\"\\ud800\"}"]
    {
        let error = load(content).unwrap_err();
        assert!(matches!(&error, Error::InvalidModel(m) if m.contains("tokenizer.json")), "{content:?}: {error}");
    }
    let deep = "[".repeat(100_000);
    assert!(matches!(load(deep.as_bytes()), Err(Error::InvalidModel(_))));

    let sound = spm_json(&vocabulary);
    load(sound.to_string().as_bytes()).unwrap();
    let broken = |pointer: &str, value: Value| {
        let mut json = sound.clone();
        *json.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value;
        load(json.to_string().as_bytes()).expect_err(pointer)
    };
    let n = vocabulary.texts().len();
    let invalid: [(&str, Value, &[&str]); 14] = [
        ("/model/vocab/▁the", json!(n), &["▁the", &n.to_string()]),
        ("/model/vocab/▁the", json!(-1), &["▁the", "-1"]),
        ("/model/vocab/▁the", json!("x"), &["▁the"]),
        ("/model/vocab", json!(null), &["vocab"]),
        ("/model/merges", json!({}), &["merges"]),
        ("/model/merges/0", json!("a"), &["merge 0"]),
        ("/model/merges/0", json!(["a", "b", "c"]), &["merge 0"]),
        ("/model/merges/0", json!(["▁hello", "zz"]), &["merge 0", "zz"]),
        ("/model/merges/0", json!(["▁hello", "▁hello"]), &["merge 0", "▁hello▁hello"]), // longer than any token
        ("/model/unk_token", json!("<nope>"), &["<nope>"]),
        ("/model/fuse_unk", json!("yes"), &["fuse_unk"]),
        ("/added_tokens/3/id", json!(1_000_000), &["<|endoftext|>", "1000000"]),
        ("/added_tokens/3", json!({"id": 5}), &["entry 3"]),
        ("/normalizer", json!({"type": "Nonsense"}), &["normalizer"]),
    ];
    for (pointer, value, words) in invalid {
        let error = broken(pointer, value);
        let Error::InvalidModel(message) = &error else { panic!("{pointer}: {error:?}") };
        assert!(message.contains("tokenizer.json") && words.iter().all(|word| message.contains(word)), "{message}");
    }
    for (pointer, value, word) in [
        ("/model/type", json!("Unigram"), "Unigram"),
        ("/model/end_of_word_suffix", json!("</w>"), "</w>"),
        ("/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece"),
        ("/decoder", json!(null), "decoder"),
    ] {
        let error = broken(pointer, value);
        assert!(matches!(&error, Error::UnsupportedModel(m) if m.contains(word)), "{pointer}: {error:?}");
    }
    // A component that makes `tokenizers` itself panic.
    let error = broken("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}));
    assert!(matches!(error, Error::InvalidModel(_)), "{error:?}");
}

#[test]
fn a_damaged_file_is_refused_or_works() {
    let folder = TempDir::new().unwrap();
    let mut random = Random::new(30);
    let (mut refused, mut works) = (0, 0);
    for vocabulary in [small(), byte_vocabulary()] {
        let sound = std::fs::read(vocabulary.save(folder.path()).path()).unwrap();
        for _ in 0..1500 {
            let mut bytes = sound.clone();
            for _ in 0..1 + random.below(4) {
                let at = random.below(bytes.len());
                bytes[at] = random.below(256) as u8;
            }
            let path = super::gguf_writer::save(folder.path(), "damaged.gguf", &bytes);
            let Ok(tokenizer) = Gguf::open(&path, true).and_then(|gguf| Tokenizer::from_gguf(&gguf)) else {
                refused += 1;
                continue;
            };
            works += 1;
            for special in [Special::All, Special::None, Special::Except(&[0, 6])] {
                let ids = tokenizer.encode("<|user|> hello\n\0 中😀</s>", special).unwrap();
                tokenizer.decode(&ids, true).unwrap();
            }
        }
    }
    assert!(refused > 100 && works > 100, "{refused} refused, {works} work");
}
