//! Turns ids, one at a time, into text as soon as their bytes are whole characters.
//!
//! Decisions: docs/design/text.md

use std::sync::Arc;

use crate::text::tokenizer::Tokenizer;

/// The text of a stream of ids. The texts of all pushes joined are [`Tokenizer::decode`] of the same ids without the
/// special ones, except for an incomplete character at the end, which is dropped.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The first bytes of a character: at most 3.
    pending: Vec<u8>,
    strip_leading_space: bool,
}

impl Detokenizer {
    /// `strip_leading_space`: drops a space at the beginning of the text ([`Tokenizer::strips_leading_space_after`] the
    /// prompt).
    pub fn new(tokenizer: Arc<Tokenizer>, strip_leading_space: bool) -> Self {
        Self { tokenizer, pending: Vec::new(), strip_leading_space }
    }

    /// The characters that this id completes; None if there are none. An invalid byte becomes one U+FFFD.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.tokenizer.is_special(id) {
            return None;
        }
        self.pending.extend_from_slice(self.tokenizer.bytes(id));
        let whole = self.pending.len() - incomplete_tail(&self.pending);
        let mut text = String::from_utf8_lossy(&self.pending[..whole]).into_owned();
        self.pending.drain(..whole);
        if text.is_empty() {
            return None;
        }
        if std::mem::take(&mut self.strip_leading_space) && text.starts_with(' ') {
            text.remove(0);
        }
        (!text.is_empty()).then_some(text)
    }
}

/// The number of bytes at the end that begin a character which more bytes could complete.
fn incomplete_tail(bytes: &[u8]) -> usize {
    // A character has at most 4 bytes, so only the last 3 can be the beginning of one.
    let starts = (1..=bytes.len().min(3)).filter(|&n| bytes[bytes.len() - n] >= 0xc0);
    let tail = |&n: &usize| str::from_utf8(&bytes[bytes.len() - n..]).is_err_and(|e| e.error_len().is_none());
    starts.take(1).find(tail).unwrap_or(0)
}
