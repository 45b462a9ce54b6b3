//! Tokenizers as the tests write them: a GGUF file, or a `tokenizer.json`.
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_phi::error::Result;
use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::gguf_writer::{BOOL, F32, I32, Writer, array, strings};

pub const NORMAL: i32 = 1;
pub const UNKNOWN: i32 = 2;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;
pub const BYTE: i32 = 6;

/// The keys of a file; `None` leaves one out.
#[derive(Clone, Default)]
pub struct Vocabulary {
    pub model: Option<String>,
    pub pre: Option<String>,
    pub tokens: Option<Vec<Vec<u8>>>,
    pub scores: Option<Vec<f32>>,
    pub types: Option<Vec<i32>>,
    pub merges: Option<Vec<String>>,
    pub ids: Vec<(&'static str, u32)>, // of `tokenizer.ggml.{}_token_id`
    pub add_space_prefix: Option<bool>,
    pub rows: Option<u64>,
}

impl Vocabulary {
    pub fn push(&mut self, token: &str, kind: i32, score: f32) {
        self.tokens.get_or_insert_default().push(token.into());
        self.types.get_or_insert_default().push(kind);
        self.scores.get_or_insert_default().push(score);
    }

    pub fn texts(&self) -> Vec<&str> {
        self.tokens.iter().flatten().map(|token| std::str::from_utf8(token).expect("test tokens are UTF-8")).collect()
    }

    pub fn save(&self, folder: &Path) -> Gguf {
        let mut writer = Writer::new().str("general.architecture", "phi3");
        let keys = [("model", &self.model), ("pre", &self.pre)];
        for (key, value) in keys.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?))) {
            writer = writer.str(&format!("tokenizer.ggml.{key}"), value);
        }
        if let Some(tokens) = &self.tokens {
            writer = writer.key("tokenizer.ggml.tokens", super::gguf_writer::ARRAY, strings(tokens));
        }
        if let Some(scores) = &self.scores {
            let bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
            let value = array(F32, scores.len() as u64, &bytes);
            writer = writer.key("tokenizer.ggml.scores", super::gguf_writer::ARRAY, value);
        }
        if let Some(types) = &self.types {
            let bytes: Vec<u8> = types.iter().flat_map(|kind| kind.to_le_bytes()).collect();
            let value = array(I32, types.len() as u64, &bytes);
            writer = writer.key("tokenizer.ggml.token_type", super::gguf_writer::ARRAY, value);
        }
        if let Some(merges) = &self.merges {
            writer = writer.key("tokenizer.ggml.merges", super::gguf_writer::ARRAY, strings(merges));
        }
        for (name, id) in &self.ids {
            writer = writer.u32(&format!("tokenizer.ggml.{name}_token_id"), *id);
        }
        if let Some(flag) = self.add_space_prefix {
            writer = writer.key("tokenizer.ggml.add_space_prefix", BOOL, [u8::from(flag)]);
        }
        if let Some(rows) = self.rows {
            writer = writer.tensor("token_embd.weight", &[1, rows], 0, &vec![0; 4 * rows as usize]);
        }
        Gguf::open(&writer.save(folder, "vocabulary.gguf"), true).expect("a sound file")
    }

    pub fn load(&self) -> Result<Tokenizer> {
        let folder = TempDir::new().expect("a temporary folder");
        Tokenizer::from_gguf(&self.save(folder.path()))
    }
}

/// A vocabulary in the style of Phi-3's, with pieces that tempt: the parts of control tokens, in any order, and scores
/// that tie.
pub fn small() -> Vocabulary {
    let mut vocabulary =
        Vocabulary { model: Some("llama".into()), pre: Some("default".into()), ..Vocabulary::default() };
    vocabulary.push("<unk>", UNKNOWN, 0.0);
    vocabulary.push("<s>", CONTROL, 0.0);
    vocabulary.push("</s>", CONTROL, 0.0);
    for byte in 0..=255u8 {
        vocabulary.push(&format!("<0x{byte:02X}>"), BYTE, 0.0);
    }
    let merged = [
        "▁t",
        "he",
        "▁the",
        "in",
        "er",
        "▁a",
        "re",
        "on",
        "▁▁",
        "▁▁▁▁",
        "▁h",
        "ll",
        "lo",
        "llo",
        "hel",
        "▁hello",
        "▁he",
        "or",
        "▁w",
        "ld",
        "▁world",
        "▁wor",
        "</",
        "s>",
        "</s",
        "<|",
        "|>",
        "<|end",
        "end",
        "en",
        "nd",
        "|end",
        "▁<",
        "▁<|",
        "us",
        "user",
        "▁end",
        "中文",
        "▁中",
        "12",
        "23",
        "123",
        "aa",
        "aaa",
        "aaaa",
        "\n\n",
        "▁I",
        "'s",
        "\u{a0}\u{a0}",
        "😀😀",
    ];
    for (i, piece) in merged.into_iter().enumerate() {
        vocabulary.push(piece, NORMAL, -((i / 3 * 3) as f32)); // three in a row are equals
    }
    let chars = "▁etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,!?'\"()<>|/_-=+*&;:#é中文😀\u{a0}";
    for (i, c) in chars.chars().enumerate() {
        vocabulary.push(&c.to_string(), NORMAL, -1000.0 - i as f32);
    }
    for token in ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"] {
        vocabulary.push(token, CONTROL, -1e6);
    }
    let n = vocabulary.texts().len() as u32;
    vocabulary.push(&format!("[PAD{n}]"), UNKNOWN, -1e6);
    vocabulary.push(&format!("[PAD{}]", n + 1), UNKNOWN, -1e6);
    vocabulary.ids = vec![("bos", 1), ("eos", n - 5), ("unknown", 0), ("padding", n - 5)];
    vocabulary
}

/// Hugging Face's `tokenizer.json` for such a vocabulary, by its definition: the pieces up to the last ordinary one,
/// every way to make one of two others, the best score first.
pub fn spm_json(vocabulary: &Vocabulary) -> Value {
    let (texts, types) = (vocabulary.texts(), vocabulary.types.as_ref().expect("types"));
    let scores = vocabulary.scores.as_ref().expect("scores");
    let last = types.iter().rposition(|&kind| kind == NORMAL || kind == BYTE).expect("pieces");
    let ids: HashMap<&str, usize> = texts[..=last].iter().enumerate().map(|(id, &text)| (text, id)).collect();
    let mut merges = Vec::new();
    for (id, piece) in texts[..=last].iter().enumerate().filter(|&(id, _)| types[id] == NORMAL) {
        let splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let mut splits: Vec<_> = splits.filter(|(l, r)| ids.contains_key(l) && ids.contains_key(r)).collect();
        splits.sort_by_key(|(l, r)| (ids[l], ids[r]));
        merges.extend(splits.into_iter().map(|split| (scores[id], split)));
    }
    merges.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("numbers"));
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, (l, r))| [l, r]).collect();
    let is_added = |&(id, text): &(usize, &&str)| id < 3 || text.starts_with("<|") && text.ends_with("|>");
    let added = texts.iter().enumerate().filter(is_added).map(|(id, &text)| {
        let rstrip = !["<unk>", "<s>", "<|endoftext|>"].contains(&text);
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": false,
               "special": text != "</s>"})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": ids, "merges": merges},
    })
}

/// The `tokenizers` crate's own tokenizer: what ours is compared with.
pub struct Reference(pub tokenizers::Tokenizer);

impl Reference {
    pub fn new(json: &Value) -> Self {
        Self(tokenizers::Tokenizer::from_bytes(json.to_string()).expect("a tokenizer"))
    }

    /// The same without added tokens: everything is spelled out.
    pub fn plain(json: &Value) -> Self {
        let mut json = json.clone();
        json["added_tokens"] = json!([]);
        Self::new(&json)
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.0.encode(text, false).expect("encodes").get_ids().to_vec()
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.0.decode(ids, skip_special).expect("decodes")
    }
}

pub fn from_json(json: &Value, gguf: &Vocabulary) -> Result<Tokenizer> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = super::gguf_writer::save(folder.path(), "tokenizer.json", json.to_string().as_bytes());
    Tokenizer::from_json(&path, &gguf.save(folder.path()))
}

/// What a stream of these ids shows.
pub fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32], strip_leading_space: bool) -> Vec<String> {
    let mut detokenizer = candle_phi::text::detokenizer::Detokenizer::new(tokenizer.clone(), strip_leading_space);
    ids.iter().filter_map(|&id| detokenizer.push(id)).collect()
}
