//! A `tokenizer.json`, Hugging Face's own format.
//!
//! Read component by component, so that what is not a BPE of this family is refused by name, and so that its added
//! tokens come into our hands. What belongs to training or to batches (dropout, truncation, padding) and the
//! post-processor, which may add a BOS, play no part in turning a text into ids here.
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::models::bpe::Vocab;

use super::added::AddedToken;
use super::merges::{Encoding, Merge};
use super::spelling::Decoder;
use super::{Family, Parts};
use crate::error::{Error, Result};

pub(super) struct Document {
    path: PathBuf,
    root: Map<String, Value>,
}

impl Document {
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let bytes = std::fs::read(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::ModelNotFound(format!("{name}: no such file")),
            _ => Error::InvalidModel(format!("{name}: {e}")),
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(root)) => Ok(Self { path: path.to_owned(), root }),
            Ok(_) => Err(Error::InvalidModel(format!("{name}: not a tokenizer: JSON, but not an object"))),
            Err(e) => Err(Error::InvalidModel(format!("{name}: not a tokenizer: {e}"))),
        }
    }

    /// Errors: `InvalidModel` for what is damaged or has ids from `n_vocab` on, `UnsupportedModel` for other kinds.
    pub fn parts(&self, n_vocab: usize) -> Result<Parts<'_>> {
        let model = self.root.get("model").and_then(Value::as_object);
        let model = model.ok_or_else(|| self.invalid("not a tokenizer: `model` is missing"))?;
        if let Some(kind) = model.get("type").filter(|kind| *kind != "BPE") {
            return Err(self.unsupported(format!("`model.type` is {kind}; supported here: \"BPE\"")));
        }
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if let Some(text) = model.get(affix).filter(|text| !text.is_null() && *text != "") {
                return Err(self.unsupported(format!("`model.{affix}` is {text}; supported here: \"\"")));
            }
        }
        let pieces = self.pieces(model, n_vocab)?;
        let mut vocab: Vocab = pieces.iter().map(|&(id, text)| (text.to_owned(), id)).collect();
        let added = self.added(n_vocab)?;
        let unk = model.get("unk_token").and_then(Value::as_str);
        if let Some(unk) = unk.filter(|unk| !vocab.contains_key(*unk)) {
            return Err(self.invalid(format!("`model.unk_token` {unk:?} is not in the vocabulary")));
        }
        // A control token is never reached from its characters, which a user's text may spell out.
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
        let component = |key: &str| self.root.get(key).cloned().unwrap_or_default();
        let broken = |key: &str, e| self.invalid(format!("`{key}`: {e}"));
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
        known
            .ok_or_else(|| self.invalid(format!("token {token:?} has the id {id}, but the model has {n_vocab} tokens")))
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
        let wrong = |i, merge| self.invalid(format!("`model.merges`: merge {i}, {merge}, is not two tokens"));
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

    /// The decoder, as far as it can be told from the bytes of single tokens: the kinds that this family uses.
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
                _ => return Err(self.unsupported(format!("`decoder` has the step {step}"))),
            }
        }
        if decoder.byte_level == decoder.metaspace {
            return Err(self.unsupported(format!("`decoder` {root} is neither byte-level nor SentencePiece's")));
        }
        Ok(decoder)
    }

    /// False when absent.
    fn flag(&self, object: &Map<String, Value>, key: &str) -> Result<bool> {
        match object.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.invalid(format!("`{key}` is {other}; it must be true or false"))),
        }
    }

    fn invalid(&self, what: impl std::fmt::Display) -> Error {
        Error::InvalidModel(format!("{}: {what}", self.path.display()))
    }

    fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::UnsupportedModel(format!("{}: {what}", self.path.display()))
    }
}
