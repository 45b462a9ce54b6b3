//! How tokens are spelled: from the vocabulary's notation to the bytes of the text.
//!
//! SPM writes a space as "▁" and a byte that is not a whole character as "<0xE2>"; byte-level BPE writes every byte
//! as one printable character, by GPT-2's table ("Ġ" is the space).

/// Which notation a vocabulary uses, and whether its decoder drops one leading space of a text.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Decoder {
    /// "▁" is a space.
    pub metaspace: bool,
    /// "<0xE2>" is a byte.
    pub byte_fallback: bool,
    /// Every character is a byte.
    pub byte_level: bool,
    pub strip: bool,
}

impl Decoder {
    fn spell(&self, token: &str, out: &mut Vec<u8>) {
        if self.byte_level {
            let start = out.len();
            for c in token.chars() {
                let Some(byte) = byte_of(c) else {
                    // Added tokens are not written in the alphabet, and need not be spelled with its characters.
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    return;
                };
                out.push(byte);
            }
        } else if let Some(byte) = fallback_byte(token).filter(|_| self.byte_fallback) {
            out.push(byte);
        } else if self.metaspace {
            for (i, part) in token.split('▁').enumerate() {
                out.extend_from_slice(if i > 0 { b" " } else { b"" });
                out.extend_from_slice(part.as_bytes());
            }
        } else {
            out.extend_from_slice(token.as_bytes());
        }
    }
}

/// The bytes of every token, one after the other.
pub(super) struct Spelling {
    bytes: Vec<u8>,
    /// Where the bytes of each id end, (n_vocab); they start where those of the id before end.
    ends: Vec<usize>,
}

impl Spelling {
    /// `tokens`: (id, text), in any order; ids at or past `n_vocab` are left out, and of two texts the last counts.
    pub fn new<'a>(n_vocab: usize, decoder: &Decoder, tokens: impl Iterator<Item = (u32, &'a str)>) -> Self {
        let mut texts = vec![""; n_vocab];
        for (id, text) in tokens {
            if let Some(slot) = texts.get_mut(id as usize) {
                *slot = text;
            }
        }
        let mut bytes = Vec::with_capacity(texts.iter().map(|text| text.len()).sum());
        let mut ends = Vec::with_capacity(n_vocab);
        for text in texts {
            decoder.spell(text, &mut bytes);
            ends.push(bytes.len());
        }
        bytes.shrink_to_fit();
        Self { bytes, ends }
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

/// The byte of "<0xE2>".
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The token of a byte in SPM's notation.
pub(super) fn fallback_token(byte: u8) -> String {
    format!("<{byte:#04X}>")
}

/// The character of a byte in GPT-2's table: printable Latin-1 is itself, the other 68 bytes are U+0100 and up.
pub(super) fn char_of(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte.into(),
        0..=0x20 => shifted(byte),
        0x7f..=0xa0 => shifted(byte - 0x7f + 0x21),
        0xad => shifted(0x43),
    }
}

fn shifted(n: u8) -> char {
    char::from_u32(0x100 + u32::from(n)).unwrap_or_default()
}

fn byte_of(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '\u{a1}'..='\u{ac}' | '\u{ae}'..='\u{ff}' => Some(c as u32 as u8),
        '\u{100}'..='\u{120}' => Some((c as u32 - 0x100) as u8),
        '\u{121}'..='\u{142}' => Some((c as u32 - 0x121) as u8 + 0x7f),
        '\u{143}' => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_one_to_one_and_printable() {
        let chars: std::collections::BTreeSet<char> = (0..=255).map(char_of).collect();
        assert_eq!(chars.len(), 256);
        assert!(chars.iter().all(|c| !c.is_whitespace() && !c.is_control()));
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!((char_of(b' '), char_of(b'\n'), char_of(0xad), byte_of('中')), ('Ġ', 'Ċ', 'Ń', None));
    }

    #[test]
    fn spm_tokens_are_spelled_with_spaces_and_bytes() {
        let spm = Decoder { metaspace: true, byte_fallback: true, byte_level: false, strip: true };
        let tokens = ["▁the", "<0x0A>", "<0xf0>", "▁▁", "<0x1>", "", "é"];
        let spelling = Spelling::new(9, &spm, tokens.into_iter().enumerate().map(|(i, text)| (i as u32, text)));
        let expected = [&b" the"[..], b"\n", b"\xf0", b"  ", b"<0x1>", b"", "é".as_bytes(), b"", b"", b""];
        for (id, bytes) in expected.into_iter().enumerate() {
            assert_eq!(spelling.bytes(id as u32), bytes, "id {id}");
        }
        assert_eq!(spelling.bytes(u32::MAX), b"");
    }

    #[test]
    fn a_byte_level_token_outside_the_alphabet_is_its_own_text() {
        let bytes = Decoder { byte_level: true, ..Decoder::default() };
        let tokens = ["Ġhi", "<|end|>", "a b", "ðŁ"];
        let spelling = Spelling::new(4, &bytes, tokens.into_iter().enumerate().map(|(i, text)| (i as u32, text)));
        let all: Vec<&[u8]> = (0..4).map(|id| spelling.bytes(id)).collect();
        assert_eq!(all, [&b" hi"[..], b"<|end|>", b"a b", b"\xf0\x9f"]);
    }
}
