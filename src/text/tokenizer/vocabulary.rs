//! The tokenizer that a GGUF file carries: arrays of tokens, types, and scores or merges, and a few ids.
//!
//! Missing parts are those of Hugging Face's tokenizers of the family: the normalizer, the splits before byte-level BPE,
//! and the added tokens that include the whitespace around them.
use tokenizers::models::bpe::Vocab;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::added::AddedToken;
use super::merges::{self, Encoding};
use super::spelling::{Decoder, char_of, fallback_token};
use super::{Family, Parts};
use crate::error::{Error, Result, excerpt};
use crate::files::gguf::Gguf;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";

/// Bytes of one token. Real ones have at most some 256; finding merges takes time that grows with the square.
const MAX_TOKEN: usize = 1024;

// Values of `tokenizer.ggml.token_type`; 2 is unknown, 5 unused, 6 a byte.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The splits of cl100k and Llama 3: contractions, words with one character before them, one to three digits,
/// punctuation with the line ends behind it, whitespace without the one space that belongs to the next word.
const CL100K: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The splits of o200k: words also end where lower case turns into upper case, and keep their contraction.
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The arrays, of one length.
struct Vocabulary<'a> {
    gguf: &'a Gguf,
    n_vocab: usize,
    tokens: Vec<&'a str>,
    types: Vec<i32>,
    /// SPM's `<unk>`. Byte-level BPE has no use for one; Phi-4 files name an ordinary token, 5809, "\u{fffd}".
    unknown: Option<u32>,
}

pub(super) fn read(gguf: &Gguf) -> Result<Parts<'_>> {
    let keys = gguf.metadata();
    let unsupported = |key: &str, value: &str, wanted: &str| {
        let path = gguf.path().display();
        Error::UnsupportedModel(format!("{path}: key `{key}` is \"{}\"; supported here: {wanted}", excerpt(value)))
    };
    let family = match keys.str(MODEL)?.ok_or_else(|| missing(gguf, MODEL))? {
        "llama" => Family::Spm,
        "gpt2" => match keys.str(PRE)?.ok_or_else(|| missing(gguf, PRE))? {
            "dbrx" => Family::Phi4,
            "gpt-4o" => Family::Phi4Mini,
            other => return Err(unsupported(PRE, other, "\"dbrx\" (Phi-4) and \"gpt-4o\" (Phi-4-mini)")),
        },
        other => return Err(unsupported(MODEL, other, "\"llama\" (Phi-3) and \"gpt2\" (Phi-4)")),
    };
    let vocabulary = Vocabulary::read(gguf, family)?;
    match family {
        Family::Spm => vocabulary.spm(),
        Family::Phi4 => vocabulary.byte_level(family, CL100K),
        Family::Phi4Mini => vocabulary.byte_level(family, O200K),
    }
}

/// The number of ids: the rows of the embedding table, or in a file without weights the number of tokens.
pub(super) fn size(gguf: &Gguf) -> Result<usize> {
    // A tensor of an unknown type has a shape that no bytes stand for.
    let table = gguf.tensor("token_embd.weight").filter(|tensor| !tensor.bytes().is_empty());
    if let Some(rows) = table.and_then(|tensor| tensor.shape.first()) {
        return Ok(*rows);
    }
    Ok(gguf.metadata().strings(TOKENS)?.ok_or_else(|| missing(gguf, TOKENS))?.len())
}

/// The token id that a key holds.
pub(super) fn id(gguf: &Gguf, key: &str, n_vocab: usize) -> Result<Option<u32>> {
    match gguf.metadata().u32(key)? {
        Some(id) if id as usize >= n_vocab => {
            let path = gguf.path().display();
            Err(Error::InvalidModel(format!("{path}: key `{key}` is {id}, but there are {n_vocab} tokens")))
        }
        id => Ok(id),
    }
}

fn missing(gguf: &Gguf, key: &str) -> Error {
    Error::InvalidModel(format!("{}: key `{key}` is missing; the tokenizer needs it", gguf.path().display()))
}

fn check_length(gguf: &Gguf, key: &str, found: usize, tokens: usize) -> Result<()> {
    if found == tokens {
        return Ok(());
    }
    let path = gguf.path().display();
    Err(Error::InvalidModel(format!("{path}: key `{key}` has {found} entries for {tokens} tokens")))
}

/// `<|user|>`: some files type these tokens as ordinary ones.
fn is_control(text: &str) -> bool {
    text.len() > 4 && text.starts_with("<|") && text.ends_with("|>")
}

/// `[PAD32011]`: a row of the embedding table that no token uses.
fn is_padding(text: &str) -> bool {
    let digits = text.strip_prefix("[PAD").and_then(|rest| rest.strip_suffix(']'));
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf, family: Family) -> Result<Self> {
        let keys = gguf.metadata();
        let invalid = |what: String| Error::InvalidModel(format!("{}: {what}", gguf.path().display()));
        let strings = keys.strings(TOKENS)?.ok_or_else(|| missing(gguf, TOKENS))?;
        let mut tokens = Vec::with_capacity(strings.len());
        for (id, bytes) in strings.iter().enumerate() {
            if bytes.len() > MAX_TOKEN {
                let len = bytes.len();
                return Err(invalid(format!(
                    "key `{TOKENS}`: token {id} has {len} bytes; at most {MAX_TOKEN} are allowed"
                )));
            }
            tokens
                .push(str::from_utf8(bytes).map_err(|_| invalid(format!("key `{TOKENS}`: token {id} is not UTF-8")))?);
        }
        let n_vocab = size(gguf)?;
        if tokens.len() > n_vocab {
            let count = tokens.len();
            return Err(invalid(format!("key `{TOKENS}` has {count} tokens; `token_embd.weight` has {n_vocab} rows")));
        }
        let types = keys.i32s(TYPES)?.ok_or_else(|| missing(gguf, TYPES))?;
        check_length(gguf, TYPES, types.len(), tokens.len())?;
        let unknown = id(gguf, UNKNOWN, tokens.len())?.filter(|_| family == Family::Spm);
        Ok(Self { gguf, n_vocab, tokens, types, unknown })
    }

    fn is_added(&self, id: usize) -> bool {
        let text = self.tokens[id];
        let typed = matches!(self.types[id], CONTROL | USER_DEFINED) || self.unknown == Some(id as u32);
        (typed || is_control(text)) && !is_padding(text) && !text.is_empty()
    }

    fn added(&self, family: Family) -> Vec<AddedToken> {
        let ids = (0..self.tokens.len()).filter(|&id| self.is_added(id));
        ids.map(|id| {
            let content = self.tokens[id];
            let (lstrip, rstrip) = match family {
                Family::Spm => (false, !matches!(content, "<unk>" | "<s>" | "<|endoftext|>")),
                Family::Phi4 => (true, true),
                Family::Phi4Mini => (false, !matches!(content, "<|endoftext|>" | "<|endofprompt|>")),
            };
            let special = match content {
                "</s>" => family != Family::Spm,
                "<|tool|>" | "<|/tool|>" | "<|tool_call|>" | "<|/tool_call|>" | "<|tool_response|>" => {
                    family != Family::Phi4Mini
                }
                _ => self.types[id] != USER_DEFINED || is_control(content),
            };
            let content = content.to_owned();
            AddedToken { id: id as u32, content, special, single_word: false, lstrip, rstrip, normalized: false }
        })
        .collect()
    }

    /// The tokens of the BPE, (id, text): all but the added tokens and the padding.
    fn pieces(&self) -> Vec<(u32, &'a str)> {
        let ids = (0..self.tokens.len()).filter(|&id| !self.is_added(id) && !is_padding(self.tokens[id]));
        ids.map(|id| (id as u32, self.tokens[id])).collect()
    }

    /// A text may contain every byte.
    fn check_bytes(&self, vocab: &Vocab, token_of: impl Fn(u8) -> String) -> Result<()> {
        for byte in 0..=255 {
            let token = token_of(byte);
            if !vocab.contains_key(&token) {
                let path = self.gguf.path().display();
                return Err(Error::InvalidModel(format!(
                    "{path}: key `{TOKENS}`: byte {byte:#04x}, {token:?}, is missing"
                )));
            }
        }
        Ok(())
    }

    fn spm(self) -> Result<Parts<'a>> {
        let keys = self.gguf.metadata();
        let scores = keys.f32s(SCORES)?.ok_or_else(|| missing(self.gguf, SCORES))?;
        check_length(self.gguf, SCORES, scores.len(), self.tokens.len())?;
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            let path = self.gguf.path().display();
            return Err(Error::InvalidModel(format!(
                "{path}: key `{SCORES}`: the score of token {id} is not a number"
            )));
        }
        let pieces = self.pieces();
        let mut vocab = vocab_of(&pieces);
        self.check_bytes(&vocab, fallback_token)?;
        let ids = pieces.iter().rev().map(|&(id, text)| (text, id)).collect();
        let normal = pieces.iter().filter(|&&(id, _)| self.types[id as usize] == NORMAL);
        let merges = merges::by_score(normal.map(|&(id, text)| (text, scores[id as usize])), &ids).ok_or_else(|| {
            let path = self.gguf.path().display();
            Error::InvalidModel(format!(
                "{path}: key `{TOKENS}`: too many merges for {} tokens, far more than in a vocabulary learned from text",
                self.tokens.len()
            ))
        })?;
        let unk = self.unknown.map(|id| self.tokens[id as usize].to_owned());
        vocab.extend(unk.clone().zip(self.unknown));
        let name = format!("{}: key `{TOKENS}`", self.gguf.path().display());
        let model =
            Encoding { vocab, merges, unk, fuse_unk: true, byte_fallback: true, ..Encoding::default() }.build(&name)?;

        let prefix = keys.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = Replace::new(" ", "▁").map_err(|e| Error::Internal(format!("a normalizer: {e}")))?;
        let prepend = prefix.then(|| NormalizerWrapper::from(Prepend::new("▁".to_owned())));
        let normalizer = Normalizers::new(prepend.into_iter().chain([replace.into()]).collect());
        Ok(Parts {
            family: Family::Spm,
            n_vocab: self.n_vocab,
            normalizer: Some(normalizer.into()),
            pre_tokenizer: None,
            model,
            added: self.added(Family::Spm),
            decoder: Decoder { metaspace: true, byte_fallback: true, byte_level: false, strip: prefix },
            pieces,
        })
    }

    fn byte_level(self, family: Family, splits: &str) -> Result<Parts<'a>> {
        let name = format!("{}: key `{MERGES}`", self.gguf.path().display());
        let lines = self.gguf.metadata().strings(MERGES)?.ok_or_else(|| missing(self.gguf, MERGES))?;
        let mut merges = Vec::with_capacity(lines.len());
        for (i, line) in lines.iter().enumerate() {
            let parts = str::from_utf8(line).ok().and_then(|line| line.split_once(' '));
            let (left, right) = parts.filter(|(_, right)| !right.contains(' ')).ok_or_else(|| {
                let line = excerpt(&String::from_utf8_lossy(line));
                Error::InvalidModel(format!(
                    "{name}: merge {i}, \"{line}\", is not two tokens with a space between them"
                ))
            })?;
            merges.push((left.to_owned(), right.to_owned()));
        }
        let pieces = self.pieces();
        let vocab = vocab_of(&pieces);
        self.check_bytes(&vocab, |byte| char_of(byte).to_string())?;
        let model = Encoding { vocab, merges, ..Encoding::default() }.build(&name)?;

        let internal = |e: tokenizers::Error| Error::Internal(format!("a pre-tokenizer: {e}"));
        let pattern = SplitPattern::Regex(splits.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(internal)?;
        let words = PreTokenizers::new(vec![split.into(), ByteLevel::new(false, true, false).into()]);
        Ok(Parts {
            family,
            n_vocab: self.n_vocab,
            normalizer: None,
            pre_tokenizer: Some(PreTokenizerWrapper::Sequence(words)),
            model,
            added: self.added(family),
            decoder: Decoder { byte_level: true, ..Decoder::default() },
            pieces,
        })
    }
}

/// Text to id; of two tokens with the same text the first.
fn vocab_of(pieces: &[(u32, &str)]) -> Vocab {
    pieces.iter().rev().map(|&(id, text)| (text.to_owned(), id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The merges of a model, first ones first.
    fn merges(model: &tokenizers::models::bpe::BPE) -> serde_json::Value {
        serde_json::to_value(model).expect("serializes")["merges"].take()
    }

    #[test]
    fn generated_merges_are_hugging_faces_in_order() {
        let shared = std::env::var_os("CANDLE_PHI_SHARED").map(std::path::PathBuf::from);
        let shared = shared.unwrap_or_else(|| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
        let folder = shared.join("data/phi3");
        if !folder.exists() {
            println!("skipped: {} is not there", folder.display());
            return;
        }
        let json = std::fs::read(folder.join("tokenizer.json")).expect("readable");
        let published: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
        let split = |merge: &serde_json::Value| match merge.as_str().and_then(|line| line.split_once(' ')) {
            Some((left, right)) => serde_json::json!([left, right]),
            None => merge.clone(),
        };
        let published: Vec<_> = published["model"]["merges"].as_array().expect("merges").iter().map(split).collect();
        assert_eq!(published.len(), 61_249);
        let gguf = Gguf::open(&folder.join("ggml-vocab-phi-3.gguf"), true).expect("opens");
        let generated = merges(&read(&gguf).expect("a vocabulary").model);
        for (i, (ours, theirs)) in generated.as_array().expect("merges").iter().zip(&published).enumerate() {
            assert_eq!(ours, theirs, "merge {i}");
        }
        assert_eq!(generated.as_array().map(Vec::len), Some(61_249));
    }

    #[test]
    fn equal_scores_merge_in_the_order_of_the_vocabulary() {
        let pieces = [("abc", -1.0), ("bc", -1.0), ("ab", -1.0), ("abcd", -0.5), ("é中", -2.0)];
        let ids = ["ab", "a", "bc", "c", "b", "abc", "d", "é", "中"];
        let ids = ids.into_iter().enumerate().map(|(id, text)| (text, id as u32)).collect();
        let merges = merges::by_score(pieces.into_iter(), &ids).expect("a few");
        let merges: Vec<String> = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
        assert_eq!(merges, ["abc d", "ab c", "a bc", "b c", "a b", "é 中"]);
    }
}
