//! Text to ids and ids to bytes, with the ids of Hugging Face's `tokenizers` on every text.
//!
//! ```text
//! text ── added tokens cut out ──> segments ── normalizer ──> segments ── pre-tokenizer ──> words ── BPE ──> ids
//!           <|user|>, lstrip, rstrip         "▁" + (" " → "▁")             byte-level only
//! ```
//! Normalizer, pre-tokenizer and BPE are the `tokenizers` crate's. The first step is ours (`added.rs`): user text, which
//! only this crate knows, never becomes a control token.
//!
//! Decisions: docs/design/text.md

use std::fmt;
use std::ops::Range;
use std::path::Path;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Model, Normalizer, OffsetType, PreTokenizedString, PreTokenizer};

use crate::error::{Error, Result, excerpt};
use crate::files::gguf::Gguf;

mod added;
mod json;
mod merges;
mod spelling;
mod vocabulary;

use added::{AddedToken, AddedTokens};
use spelling::{Decoder, Spelling};

/// Which tokenizer of the Phi-3 family it is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Family {
    /// SentencePiece BPE with byte fallback: Phi-3, Phi-3.5 and the bundled model.
    Spm,
    /// Byte-level BPE over cl100k's splits: Phi-4.
    Phi4,
    /// Byte-level BPE over o200k's splits: Phi-4-mini.
    Phi4Mini,
}

/// The parts of a text in which added tokens (`<|user|>`, `</s>`) are recognized. Elsewhere their characters are text.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Special<'a> {
    /// Nowhere.
    None,
    /// Everywhere.
    All,
    /// Everywhere, but none that overlaps one of these byte ranges, ascending and apart from one another: the user's
    /// text.
    Outside(&'a [Range<usize>]),
}

/// One tokenizer, from a GGUF file or a `tokenizer.json`.
pub struct Tokenizer {
    family: Family,
    n_vocab: usize,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: BPE,
    added: AddedTokens,
    spelling: Spelling,
    /// Decoding drops one leading space of the whole text.
    strips_leading_space: bool,
    /// A segment after an added token begins with a "▁" that is not in the text.
    prefixes_segments: bool,
    bos_id: Option<u32>,
    stop_ids: Vec<u32>,
}

/// Without the tables, which would fill pages.
impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, n_vocab, .. } = self;
        f.debug_struct("Tokenizer").field("family", family).field("n_vocab", n_vocab).finish_non_exhaustive()
    }
}

/// The parts of a tokenizer in a file.
struct Parts<'a> {
    family: Family,
    n_vocab: usize,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: BPE,
    added: Vec<AddedToken>,
    decoder: Decoder,
    /// `(id, text)` of the tokens that are not added ones.
    pieces: Vec<(u32, &'a str)>,
}

impl Tokenizer {
    /// The tokenizer that a GGUF file carries: `tokenizer.ggml.model` "llama", or "gpt2" with `pre` "dbrx" or "gpt-4o".
    ///
    /// # Errors
    ///
    /// `UnsupportedModel` for other kinds, `InvalidModel` for arrays that are missing or contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::assemble(gguf.path(), vocabulary::read(gguf)?, gguf)
    }

    /// A `tokenizer.json` to use instead of the one in `gguf`, which still says how many ids there are and which of
    /// them begin and end a text.
    ///
    /// # Errors
    ///
    /// `ModelNotFound`; `InvalidModel` for another kind of file, and for ids that the model does not have;
    /// `UnsupportedModel` for tokenizers of another kind than BPE.
    pub fn from_json(path: &Path, gguf: &Gguf) -> Result<Self> {
        let document = json::Document::open(path)?;
        // The steps of a file may be ones of `tokenizers` that panic on some settings. The probe runs each of them once, and
        // a panic counts as damage of the file.
        let build = || {
            let tokenizer = Self::assemble(path, document.parts(vocabulary::size(gguf)?)?, gguf)?;
            tokenizer.encode("A probe: 1\u{a0}é\n", Special::All)?;
            Ok(tokenizer)
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(build)).unwrap_or_else(|_| {
            let path = path.display();
            Err(Error::InvalidModel(format!("{path}: the tokenizer does not work: it fails on a short text")))
        })
    }

    /// `path`: of the file that `parts` are from.
    fn assemble(path: &Path, parts: Parts<'_>, gguf: &Gguf) -> Result<Self> {
        let Parts { family, n_vocab, normalizer, pre_tokenizer, model, added, decoder, pieces } = parts;
        let added = AddedTokens::new(path, added, normalizer.as_ref())?;
        let spelling = Spelling::new(n_vocab, &decoder, pieces.into_iter().chain(added.texts()));
        let mut tokenizer = Self {
            family,
            n_vocab,
            normalizer,
            pre_tokenizer,
            model,
            added,
            spelling,
            strips_leading_space: decoder.strip,
            prefixes_segments: false,
            bos_id: vocabulary::id(gguf, "tokenizer.ggml.bos_token_id", n_vocab)?,
            stop_ids: Vec::new(),
        };
        tokenizer.prefixes_segments = tokenizer.probe_prefix()?;
        tokenizer.stop_ids = tokenizer.find_stop_ids(gguf)?;
        Ok(tokenizer)
    }

    /// Whether `<|user|>a` is the ids of "<|user|>" and of " a": the normalizer's rules need not be known for that.
    fn probe_prefix(&self) -> Result<bool> {
        let Some(token) = self.added.first() else { return Ok(false) };
        let ids = self.encode(&format!("{token}a"), Special::All)?;
        Ok(ids.get(1).is_some_and(|&id| self.bytes(id).starts_with(b" ")))
    }

    /// `eos_token_id` alone is not enough: Phi-3's is `<|endoftext|>`, and it ends its turns with `<|end|>`. After
    /// `<|assistant|>`, which is a stop id too, an SPM Phi-3 would go on talking to itself.
    fn find_stop_ids(&self, gguf: &Gguf) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            ids.extend(vocabulary::id(gguf, key, self.n_vocab)?);
        }
        let texts = ["<|end|>", "<|endoftext|>", "<|im_end|>"];
        let turn = (self.family == Family::Spm).then_some("<|assistant|>");
        ids.extend(texts.into_iter().chain(turn).filter_map(|text| self.token_to_id(text)));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The ids of `text`; no BOS is added. An empty text has none.
    pub fn encode(&self, text: &str, special: Special<'_>) -> Result<Vec<u32>> {
        // The regular expression of a `tokenizer.json` may fail on a text.
        self.try_encode(text, special).map_err(|e| {
            Error::InvalidModel(format!(
                "the tokenizer fails on a text of {} bytes: {}",
                text.len(),
                excerpt(&e.to_string())
            ))
        })
    }

    fn try_encode(&self, text: &str, special: Special<'_>) -> tokenizers::Result<Vec<u32>> {
        let user = match special {
            Special::None => None,
            Special::All => Some(&[][..]),
            Special::Outside(ranges) => Some(ranges),
        };
        debug_assert!(user.is_none_or(|ranges| ranges.is_sorted_by(|a, b| a.end <= b.start)));
        let mut text = PreTokenizedString::from(text);
        if let Some(user) = user {
            text.split(|_, whole| self.added.split(whole, user))?;
        }
        text.split(|_, mut segment| {
            if let Some(normalizer) = &self.normalizer {
                normalizer.normalize(&mut segment)?;
            }
            match user {
                Some(user) => self.added.split_normalized(segment, user),
                None => Ok(vec![(segment, None)]),
            }
        })?;
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut text)?;
        }
        text.tokenize(|word| self.model.tokenize(word.get()))?;
        Ok(text.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
    }

    /// The text of `ids`, like Hugging Face's `decode` for valid UTF-8: without the special ids if `skip_special`, and in
    /// the SPM family without one leading space. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    ///
    /// `Value` for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::new();
        for &id in ids {
            if id as usize >= self.n_vocab {
                let n_vocab = self.n_vocab;
                return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab} tokens")));
            }
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.bytes(id));
            }
        }
        let text = if self.strips_leading_space { bytes.strip_prefix(b" ").unwrap_or(&bytes) } else { &bytes };
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// The bytes of the text of one token, perhaps only a part of a character; empty for an id that has no text.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.spelling.bytes(id)
    }

    /// Whether the token is left out of decoded text. Of Phi-3's added tokens, `</s>` is not.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.get(id).is_some_and(|token| token.special)
    }

    /// Whether the token is found in text verbatim, and not by merging characters.
    pub fn is_added(&self, id: u32) -> bool {
        self.added.get(id).is_some()
    }

    /// The id of a token as the vocabulary writes it ("▁the", "<|end|>").
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| self.model.token_to_id(token))
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The ids that end a text, in ascending order: by the file's keys (`eos`, `eot`) and by their texts.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Ids are below this. The last ones may have no text: vocabularies are padded to a round number of rows.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    pub fn family(&self) -> Family {
        self.family
    }

    /// Whether the text generated after these prompt ids begins a new segment, so that its one leading space is the
    /// tokenizer's and not the model's: after an added token, or after whitespace that follows one.
    pub fn strips_leading_space_after(&self, prompt: &[u32]) -> bool {
        let is_space = |id| str::from_utf8(self.bytes(id)).is_ok_and(|text| !text.is_empty() && text.trim().is_empty());
        let last = prompt.iter().rev().copied().find(|&id| self.is_added(id) || !is_space(id));
        self.prefixes_segments && last.is_some_and(|id| self.is_added(id))
    }
}
