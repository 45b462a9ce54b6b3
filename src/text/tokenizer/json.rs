//! A `tokenizer.json`, Hugging Face's own format.
//!
//! Read component by component: components of other tokenizers are refused by name, and the added tokens are matched by
//! `added.rs`. Dropout, truncation, padding and the post-processor, which may add a BOS, are ignored: they belong to
//! training and to batches.
//!
//! Decisions: docs/design/files.md

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::models::bpe::Vocab;

use super::added::AddedToken;
use super::merges::{Encoding, Merge};
use super::spelling::Decoder;
use super::{Family, Parts};
use crate::error::{self, Error, Result};

/// The largest of this family have 16 MB; parsed JSON takes several times its length.
const MAX_FILE: u64 = 64 << 20;

/// Limits: the number of normalizers and splits, the factor by which they lengthen a text together, and the length of a
/// regular expression. "a -> aa" sixty times is a line of JSON, and so is an automaton of a hundred MB.
const MAX_STEPS: usize = 16;
const MAX_GROWTH: usize = 64;
const MAX_REGEX: usize = 1024;

pub(super) struct Document {
    path: PathBuf,
    root: Map<String, Value>,
}

impl Document {
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound => Error::ModelNotFound(format!("{name}: no such file")),
            _ => Error::InvalidModel(format!("{name}: {e}")),
        };
        let kind = std::fs::metadata(path).map_err(failed)?;
        if !kind.is_file() {
            return Err(Error::InvalidModel(format!("{name}: not a tokenizer: this is not a regular file")));
        }
        if kind.len() > MAX_FILE {
            let length = kind.len();
            return Err(Error::InvalidModel(format!(
                "{name}: not a tokenizer: it has {length} bytes; the limit is {MAX_FILE}"
            )));
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(root)) => Ok(Self { path: path.to_owned(), root }),
            Ok(_) => Err(Error::InvalidModel(format!("{name}: not a tokenizer: JSON, but not an object"))),
            Err(e) => Err(Error::InvalidModel(format!("{name}: not a tokenizer: {e}"))),
        }
    }

    /// # Errors
    ///
    /// `InvalidModel` for damage and for ids from `n_vocab` on, `UnsupportedModel` for other kinds.
    pub fn parts(&self, n_vocab: usize) -> Result<Parts<'_>> {
        let model = self.root.get("model").and_then(Value::as_object);
        let model = model.ok_or_else(|| self.invalid("not a tokenizer: `model` is missing"))?;
        if let Some(kind) = model.get("type").filter(|kind| *kind != "BPE") {
            return Err(self.unsupported(format!("`model.type` is {}; supported here: \"BPE\"", excerpt(kind))));
        }
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if let Some(text) = model.get(affix).filter(|text| !text.is_null() && *text != "") {
                return Err(self.unsupported(format!("`model.{affix}` is {}; supported here: \"\"", excerpt(text))));
            }
        }
        let pieces = self.pieces(model, n_vocab)?;
        let mut vocab: Vocab = pieces.iter().map(|&(id, text)| (text.to_owned(), id)).collect();
        let added = self.added(n_vocab)?;
        let unk = model.get("unk_token").and_then(Value::as_str);
        if let Some(unk) = unk.filter(|unk| !vocab.contains_key(*unk)) {
            return Err(self.invalid(format!("`model.unk_token` \"{}\" is not in the vocabulary", error::excerpt(unk))));
        }
        // Merges must not lead to a control token, because user text may contain its characters.
        let special = added.iter().filter(|token| token.special && unk != Some(&token.content));
        let control: HashSet<&str> = special.map(|token| token.content.as_str()).collect();
        vocab.retain(|text, _| !control.contains(text.as_str()));
        let mut merges = self.merges(model)?;
        merges.retain(|(left, right)| {
            ![left, right, &[left.as_str(), right.as_str()].concat()].iter().any(|text| control.contains(text.as_str()))
        });
        let decoder = self.decoder()?;
        let family = match decoder.byte_level {
            false => Family::Spm,
            true if control.contains("<|im_start|>") => Family::Phi4,
            true => Family::Phi4Mini,
        };
        let encoding = Encoding {
            vocab,
            merges,
            unk: unk.map(str::to_owned),
            fuse_unk: self.flag(model, "fuse_unk")?,
            byte_fallback: self.flag(model, "byte_fallback")?,
            ignore_merges: self.flag(model, "ignore_merges")?,
        };
        let model = encoding.build(&format!("{}: `model.merges`", self.path.display()))?;
        self.check_steps()?;
        let component = |key: &str| self.root.get(key).cloned().unwrap_or_default();
        let broken =
            |key: &str, e: serde_json::Error| self.invalid(format!("`{key}`: {}", error::excerpt(&e.to_string())));
        let normalizer = serde_json::from_value(component("normalizer")).map_err(|e| broken("normalizer", e))?;
        let pre_tokenizer = component("pre_tokenizer");
        let pre_tokenizer = serde_json::from_value(pre_tokenizer).map_err(|e| broken("pre_tokenizer", e))?;
        Ok(Parts { family, n_vocab, normalizer, pre_tokenizer, model, added, decoder, pieces })
    }

    fn pieces<'a>(&self, model: &'a Map<String, Value>, n_vocab: usize) -> Result<Vec<(u32, &'a str)>> {
        let vocab = model.get("vocab").and_then(Value::as_object);
        let vocab = vocab.ok_or_else(|| self.invalid("not a tokenizer: `model.vocab` is missing"))?;
        vocab.iter().map(|(text, id)| Ok((self.id(text, id, n_vocab)?, text.as_str()))).collect()
    }

    fn id(&self, token: &str, id: &Value, n_vocab: usize) -> Result<u32> {
        let known = id.as_u64().filter(|&id| id < n_vocab as u64).and_then(|id| u32::try_from(id).ok());
        known.ok_or_else(|| {
            let (token, id) = (error::excerpt(token), excerpt(id));
            self.invalid(format!("token \"{token}\" has the id {id}, but the model has {n_vocab} tokens"))
        })
    }

    fn merges(&self, model: &Map<String, Value>) -> Result<Vec<Merge>> {
        let merges = model.get("merges").and_then(Value::as_array);
        let merges = merges.ok_or_else(|| self.invalid("not a tokenizer: `model.merges` is missing"))?;
        let pair = |merge: &Value| match merge {
            Value::String(line) => line
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))
                .map(|(a, b)| (a.to_owned(), b.to_owned())),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.clone(), right.clone())),
                _ => None,
            },
            _ => None,
        };
        // A merges.txt that was copied line by line begins with its version.
        let is_merge = |merge: &&Value| !merge.as_str().is_some_and(|line| line.starts_with("#version"));
        let merges = merges.iter().filter(is_merge).enumerate();
        let wrong =
            |i, merge| self.invalid(format!("`model.merges`: merge {i}, {}, is not two tokens", excerpt(merge)));
        merges.map(|(i, merge)| pair(merge).ok_or_else(|| wrong(i, merge))).collect()
    }

    fn added(&self, n_vocab: usize) -> Result<Vec<AddedToken>> {
        let Some(list) = self.root.get("added_tokens").filter(|list| !list.is_null()) else { return Ok(Vec::new()) };
        let list = list.as_array().ok_or_else(|| self.invalid("`added_tokens` is not a list"))?;
        let mut tokens = Vec::with_capacity(list.len());
        for (i, entry) in list.iter().enumerate() {
            let entry = entry.as_object();
            let content = entry.and_then(|entry| entry.get("content")).and_then(Value::as_str);
            let (Some(entry), Some(content)) = (entry, content) else {
                return Err(self.invalid(format!("`added_tokens`: entry {i} has no `content`")));
            };
            let id = self.id(content, entry.get("id").unwrap_or(&Value::Null), n_vocab)?;
            let flag = |key: &str| self.flag(entry, key);
            tokens.push(AddedToken {
                id,
                content: content.to_owned(),
                special: flag("special")?,
                single_word: flag("single_word")?,
                lstrip: flag("lstrip")?,
                rstrip: flag("rstrip")?,
                normalized: flag("normalized")?,
            });
        }
        Ok(tokens)
    }

    /// Whether the normalizers and pre-tokenizers are of known kinds, and how much longer they make a text.
    fn check_steps(&self) -> Result<()> {
        let (mut steps, mut growth) = (0, 1usize);
        let component = |key| self.root.get(key).filter(|step| !step.is_null()).map(|step| (key, step));
        let mut todo: Vec<(&str, &Value)> = ["normalizer", "pre_tokenizer"].into_iter().filter_map(component).collect();
        while let Some((key, step)) = todo.pop() {
            let length = |name: &str| step[name].as_str().map_or(0, str::len);
            let pattern = &step["pattern"];
            if let Some(regex) = pattern["Regex"].as_str().filter(|regex| regex.len() > MAX_REGEX) {
                let n = regex.len();
                return Err(self.unsupported(format!("`{key}` has a regex of {n} bytes; the limit is {MAX_REGEX}")));
            }
            growth = growth.saturating_mul(match step["type"].as_str().unwrap_or_default() {
                "Sequence" => {
                    let parts = step["normalizers"].as_array().or(step["pretokenizers"].as_array());
                    todo.extend(parts.into_iter().flatten().map(|part| (key, part)));
                    1
                }
                // Each occurrence becomes the content; a regex, or an empty text, occurs at every byte and at the end.
                "Replace" => match pattern["String"].as_str().map_or(0, str::len) {
                    0 => length("content") + 1,
                    n => length("content").div_ceil(n).max(1),
                },
                "Prepend" => length("prepend") + 1,
                "Metaspace" => 5,
                "ByteLevel" => 2,
                "NFC" | "NFD" | "NFKC" | "NFKD" => 12, // U+FDFA decomposes into 18 characters
                "Lowercase" => 2,
                "Strip" | "StripAccents" | "Split" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit" => 1,
                _ => return Err(self.unsupported(format!("`{key}` has the step {}", excerpt(step)))),
            });
            steps += 1;
        }
        if steps > MAX_STEPS || growth > MAX_GROWTH {
            return Err(self.unsupported(format!(
                "`normalizer` and `pre_tokenizer` have {steps} steps that make a text {growth} times as long; at most \
                 {MAX_STEPS} steps and {MAX_GROWTH} times are supported"
            )));
        }
        Ok(())
    }

    /// The decoder, if its steps work on the bytes of single tokens, as in this family.
    fn decoder(&self) -> Result<Decoder> {
        let root = self.root.get("decoder").unwrap_or(&Value::Null);
        let steps = match root.get("decoders").and_then(Value::as_array) {
            Some(steps) if root["type"] == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(root),
        };
        let mut decoder = Decoder::default();
        let mut fused = false;
        for step in steps {
            let space = step["pattern"]["String"] == "▁" && step["content"] == " ";
            let strip = step["content"] == " " && step["start"].as_u64() <= Some(1) && step["stop"] == 0;
            match step["type"].as_str() {
                Some("ByteLevel") => decoder.byte_level = true,
                Some("ByteFallback") => decoder.byte_fallback = true,
                Some("Fuse") => fused = true,
                Some("Replace") if space => decoder.metaspace = true,
                Some("Strip") if strip && fused => decoder.strip = step["start"] == 1,
                _ => return Err(self.unsupported(format!("`decoder` has the step {}", excerpt(step)))),
            }
        }
        if decoder.byte_level == decoder.metaspace {
            return Err(
                self.unsupported(format!("`decoder` {} is neither byte-level nor SentencePiece's", excerpt(root)))
            );
        }
        Ok(decoder)
    }

    /// False when absent.
    fn flag(&self, object: &Map<String, Value>, key: &str) -> Result<bool> {
        match object.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.invalid(format!("`{key}` is {}; it must be true or false", excerpt(other)))),
        }
    }

    fn invalid(&self, what: impl std::fmt::Display) -> Error {
        Error::InvalidModel(format!("{}: {what}", self.path.display()))
    }

    fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::UnsupportedModel(format!("{}: {what}", self.path.display()))
    }
}

/// A value of the file, for an error message.
fn excerpt(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(map) => match map.get("type") {
            Some(kind @ Value::String(_)) => format!("{{\"type\": {}}}", excerpt(kind)),
            _ => "an object".to_owned(),
        },
        Value::String(text) => format!("\"{}\"", error::excerpt(text)),
        other => other.to_string(),
    }
}
