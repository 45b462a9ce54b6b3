//! Wrong files, and what a user reads about them.
use candle_phi::error::Error;
use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::{Special, Tokenizer};
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
    let invalid: [(&str, Value, &[&str]); 26] = [
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
        ("/model", json!([]), &["`model` is missing"]),
        ("/model/vocab", json!([["▁the", 0]]), &["vocab"]),
        ("/model/vocab/▁the", json!(1.5), &["▁the", "1.5"]),
        ("/model/vocab/▁the", json!(u64::MAX), &["▁the", "18446744073709551615"]),
        ("/model/vocab/▁the", json!(1u64 << 32), &["▁the", "4294967296"]),
        ("/model/merges/0", json!(null), &["merge 0", "null"]),
        ("/model/merges/0", json!(["▁hello", 7]), &["merge 0", "a list"]),
        ("/added_tokens", json!("none"), &["`added_tokens` is not a list"]),
        ("/added_tokens/3/content", json!(null), &["entry 3"]),
        ("/added_tokens/3/special", json!(1), &["`special` is 1"]),
        ("/added_tokens/3/content", json!("<".repeat(300_000)), &["added tokens of 300", "at most 262144"]),
        ("/normalizer", json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), &["`normalizer`"]),
        ("/normalizer", json!({"type": "Prepend"}), &["`normalizer`"]),
    ];
    for (pointer, value, words) in invalid {
        let error = broken(pointer, value);
        let Error::InvalidModel(message) = &error else { panic!("{pointer}: {error:?}") };
        assert!(message.contains("tokenizer.json") && words.iter().all(|word| message.contains(word)), "{message}");
    }
    let replace =
        |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "normalizers": steps});
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let in_turn = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    for (pointer, value, word) in [
        // What would fill memory: a text that doubles sixty times, many steps, an automaton of any size.
        ("/normalizer", sequence(vec![replace("a", "aa"); 10]), "11 steps that make a text 1024 times"),
        ("/normalizer", sequence(vec![replace("a", "aa"); 2000]), "18446744073709551615 times"),
        ("/normalizer", sequence(vec![sequence(vec![replace("ab", "abab"); 7])]), "128 times"),
        ("/normalizer", replace("", &"a".repeat(64)), "65 times"),
        ("/normalizer", json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)}), "1048577 times"),
        ("/normalizer", sequence(vec![json!({"type": "NFC"}); 17]), "18 steps"),
        ("/pre_tokenizer", in_turn(vec![byte_level; 7]), "1536 times"),
        ("/pre_tokenizer", in_turn(vec![split("a"); 17]), "21 steps"),
        ("/pre_tokenizer", split(&"(?=a{900})".repeat(200)), "a regex of 2000 bytes"),
        // Kinds that no tokenizer of the family has.
        ("/normalizer", json!({"type": "Nonsense"}), "`normalizer` has the step {\"type\": \"Nonsense\"}"),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""}), "Precompiled"),
        ("/normalizer", json!([]), "`normalizer` has the step a list"),
        ("/normalizer", json!("x".repeat(5000)), "`normalizer` has the step \"xxx"),
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "FixedLength"), // which divides by it
        ("/pre_tokenizer", in_turn(vec![json!({"type": "UnicodeScripts"})]), "UnicodeScripts"),
        ("/model/type", json!("Unigram"), "Unigram"),
        ("/model/type", json!({"BPE": "x".repeat(5000)}), "`model.type` is an object"),
        ("/model/continuing_subword_prefix", json!("x".repeat(5000)), "continuing_subword_prefix"),
        ("/model/end_of_word_suffix", json!("</w>"), "</w>"),
        ("/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece"),
        ("/decoder", json!(null), "decoder"),
    ] {
        let error = broken(pointer, value);
        assert!(matches!(&error, Error::UnsupportedModel(m) if m.contains(word)), "{pointer}: {error:?}");
        assert!(error.to_string().len() < 400, "{error}");
    }
}

/// A sound file, small enough to be cut everywhere.
fn tiny_json() -> String {
    let added = json!({"id": 0, "content": "<unk>", "special": true, "normalized": false});
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
    let normalizer = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let model = json!({"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
        "vocab": {"<unk>": 0, "h": 1, "e": 2, "▁": 3, "he": 4, "▁he": 5}, "merges": ["h e", ["▁", "he"]]});
    json!({"added_tokens": [added], "normalizer": normalizer, "decoder": decoder, "model": model}).to_string()
}

#[test]
fn a_damaged_tokenizer_json_is_refused_or_works() {
    let folder = TempDir::new().unwrap();
    let gguf = small().save(folder.path());
    let sound = tiny_json();
    let attempt = |content: &[u8]| {
        let path = super::gguf_writer::save(folder.path(), "tokenizer.json", content);
        match Tokenizer::from_json(&path, &gguf) {
            Ok(tokenizer) => {
                for special in [Special::All, Special::None, Special::Outside(&[0..3, 6..9])] {
                    let ids = tokenizer.encode("<|user|> hello\n\0 中😀</s>", special).unwrap();
                    tokenizer.decode(&ids, true).unwrap();
                }
                true
            }
            Err(Error::InvalidModel(message) | Error::UnsupportedModel(message)) => {
                assert!(message.contains("tokenizer") && message.len() < 600 && !message.contains('\n'), "{message}");
                false
            }
            Err(error) => panic!("{error:?}"),
        }
    };
    assert!(attempt(sound.as_bytes()));
    for end in 0..sound.len() {
        assert!(!attempt(&sound.as_bytes()[..end]), "opens when cut at {end}");
    }
    let mut random = Random::new(31);
    let mut works = 0;
    for _ in 0..4000 {
        let mut bytes = sound.clone().into_bytes();
        for _ in 0..1 + random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        }
        works += usize::from(attempt(&bytes));
    }
    assert!((100..3900).contains(&works), "{works} work");
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
            for special in [Special::All, Special::None, Special::Outside(&[0..3, 6..9])] {
                let ids = tokenizer.encode("<|user|> hello\n\0 中😀</s>", special).unwrap();
                tokenizer.decode(&ids, true).unwrap();
            }
        }
    }
    assert!(refused > 100 && works > 100, "{refused} refused, {works} work");
}
