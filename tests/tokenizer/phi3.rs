//! Phi-3's own vocabulary: skipped, saying so, where `../shared/data/phi3` is not there.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::{Special, Tokenizer};
use serde_json::Value;

use super::texts::{Random, texts};
use super::vocabulary::{Reference, stream};

struct Phi3 {
    folder: PathBuf,
    json: Value,
    ours: Arc<Tokenizer>,
    from_json: Arc<Tokenizer>,
}

fn phi3() -> Option<Phi3> {
    let shared = std::env::var_os("CANDLE_PHI_SHARED").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let folder = shared.join("data/phi3");
    if !folder.exists() {
        println!("skipped: {} is not there", folder.display());
        return None;
    }
    let path = folder.join("tokenizer.json");
    let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let start = Instant::now();
    let gguf = Gguf::open(&folder.join("ggml-vocab-phi-3.gguf"), true).unwrap();
    let opened = start.elapsed();
    let ours = Arc::new(Tokenizer::from_gguf(&gguf).unwrap());
    println!("file opened in {opened:?}, tokenizer built in {:?}", start.elapsed() - opened);
    let from_json = Arc::new(Tokenizer::from_json(&path, &gguf).unwrap());
    Some(Phi3 { folder, json, ours, from_json })
}

#[test]
fn llama_cpp_vectors() {
    let Some(Phi3 { folder, ours, .. }) = phi3() else { return };
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let (texts, ids) = (read("ggml-vocab-phi-3.gguf.inp"), read("ggml-vocab-phi-3.gguf.out"));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let mut compared = 0;
    for (text, line) in texts.iter().zip(ids.split('\n')) {
        let ids: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(ours.encode(text, Special::All).unwrap(), ids, "{text:?}");
        compared += 1;
    }
    assert_eq!(compared, 47);
}

#[test]
fn the_ids_are_those_of_hugging_face() {
    let Some(Phi3 { json, ours, from_json, .. }) = phi3() else { return };
    let (reference, plain) = (Reference::new(&json), Reference::plain(&json));
    let pieces: Vec<&str> = json["model"]["vocab"].as_object().unwrap().keys().map(String::as_str).collect();
    let tokens: Vec<&str> =
        json["added_tokens"].as_array().unwrap().iter().map(|token| token["content"].as_str().unwrap()).collect();
    assert_eq!(tokens.len(), 14);
    for text in texts(10, 12_000, &pieces, &tokens) {
        let (all, none) = (reference.encode(&text), plain.encode(&text));
        for tokenizer in [&ours, &from_json] {
            assert_eq!(tokenizer.encode(&text, Special::All).unwrap(), all, "{text:?}");
            assert_eq!(tokenizer.encode(&text, Special::None).unwrap(), none, "{text:?}, spelled out");
        }
        let back = ours.decode(&all, false).unwrap();
        assert_eq!(back, reference.decode(&all, false), "{text:?}");
        assert_eq!(ours.decode(&none, false).unwrap(), text.replace('▁', " "));
    }
}

#[test]
fn the_table_of_prompts() {
    let Some(Phi3 { ours, from_json, .. }) = phi3() else { return };
    for tokenizer in [ours, from_json] {
        let ids = |text: &str| tokenizer.encode(text, Special::All).unwrap();
        assert_eq!(ids("<|user|>\nHello<|end|>\n<|assistant|>\n"), [32010, 15043, 32007, 32001]);
        assert_eq!(ids("<|user|>Hello<|end|><|assistant|>"), [32010, 15043, 32007, 32001]);
        assert_eq!(ids("<s><|user|>\nHello<|end|>\n<|assistant|>\n"), [1, 32010, 15043, 32007, 32001]);
        assert_eq!(ids("<|user|>\n  hi<|end|>\n<|assistant|>\n"), [32010, 7251, 32007, 32001]);
        assert_eq!(ids("<|end|>\u{a0}\u{3000}\u{2028}hi"), [32007, 7251]);
        assert_eq!(ids("</s> hi"), [2, 7251]);
        assert!(!tokenizer.encode("</s>", Special::None).unwrap().contains(&2));
        assert!(ids("").is_empty());
        assert_eq!(tokenizer.stop_ids(), [32000, 32001, 32007]);
        assert_eq!((tokenizer.bos_id(), tokenizer.n_vocab()), (Some(1), 32064));
        assert_eq!(tokenizer.decode(&[1, 2, 32000, 15043, 32007, 32064 - 1], true).unwrap(), "</s> Hello");
        let special: Vec<u32> = (0..32064).filter(|&id| tokenizer.is_special(id)).collect();
        assert_eq!(special, [0, 1].into_iter().chain(32000..=32010).collect::<Vec<_>>());
    }
}

#[test]
fn user_text_is_never_a_control_token() {
    let Some(Phi3 { json, ours, from_json, .. }) = phi3() else { return };
    let plain = Reference::plain(&json);
    let pieces: Vec<&str> = json["model"]["vocab"].as_object().unwrap().keys().map(String::as_str).collect();
    for user in texts(11, 3000, &pieces, &["<|end|>", "<|system|>", "<|placeholder1|>", "<s>", "</s>", "<unk>"]) {
        let prompt = format!("<|user|>\n{user}<|end|>\n<|assistant|>\n");
        for tokenizer in [&ours, &from_json] {
            let start = "<|user|>\n".len();
            let ids = tokenizer
                .encode(&prompt, Special::Outside(std::slice::from_ref(&(start..start + user.len()))))
                .unwrap();
            let expected = [&[32010][..], &plain.encode(user.trim_start()), &[32007, 32001]].concat();
            assert_eq!(ids, expected, "{user:?}");
        }
    }
}

#[test]
fn streamed_is_decoded_is_hugging_face() {
    let Some(Phi3 { json, ours, .. }) = phi3() else { return };
    let reference = Reference::new(&json);
    let mut random = Random::new(12);
    let mut valid = 0;
    for _ in 0..20_000 {
        let mut ids: Vec<u32> = (0..random.below(10)).map(|_| random.below(32064) as u32).collect();
        for c in (0..random.below(3)).map(|_| random.char()).collect::<String>().bytes() {
            ids.push(3 + u32::from(c)); // byte fallback
        }
        ids.extend((0..random.below(4)).map(|_| random.below(300) as u32));
        let bytes: Vec<u8> =
            ids.iter().filter(|&&id| !ours.is_special(id)).flat_map(|&id| ours.bytes(id)).copied().collect();
        if std::str::from_utf8(&bytes).is_err() {
            continue;
        }
        valid += 1;
        let text = ours.decode(&ids, true).unwrap();
        assert_eq!(text, reference.decode(&ids, true), "{ids:?}");
        assert_eq!(stream(&ours, &ids, true).concat(), text, "{ids:?}");
    }
    assert!(valid > 5000, "{valid} valid texts");
}
