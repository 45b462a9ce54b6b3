//! Texts to try tokenizers with: the same ones at every run.

pub use super::gguf_writer::model::Random;

impl Random {
    pub fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    /// Any character: mostly from the ranges that text is made of.
    pub fn char(&mut self) -> char {
        let ranges = [
            0x20..0x7f,
            0x20..0x7f,
            0x00..0x20,
            0x80..0x250,
            0x370..0x530,
            0x590..0x700,
            0x900..0xe00,
            0x1e00..0x2100,
            0x2190..0x2c00,
            0x3000..0x3100,
            0x4e00..0xa000,
            0xac00..0xd7a4,
            0xfb50..0xfe10,
            0x1f000..0x1fb00,
            0x0..0x11_0000,
        ];
        let range = &ranges[self.below(ranges.len())];
        char::from_u32((range.start + self.below(range.len())) as u32).unwrap_or('\u{fffd}')
    }

    fn some(&mut self, n: usize, mut piece: impl FnMut(&mut Self) -> String) -> String {
        (0..=self.below(n)).map(|_| piece(self)).collect()
    }
}

const SPACES: [&str; 16] = [
    " ", " ", " ", "  ", "    ", "\n", "\n", "\t", "\r", "\r\n", "\u{a0}", "\u{3000}", "\u{2028}", "\u{85}",
    "\u{2003}", "\u{b}",
];

const WORDS: [&str; 44] = [
    "the",
    "Hello",
    "world",
    "HTTPServer",
    "don't",
    "I'M",
    "we'll",
    "'s",
    "'S",
    "it's",
    "1234567",
    "3.14",
    "٣٤٥",
    "½",
    "été",
    "naïve",
    "e\u{301}",
    "Straße",
    "ŉ",
    "ſ",
    "'ſ",
    "日本語",
    "中文。",
    "한국어",
    "ไทย",
    "עברית",
    "😀",
    "👩‍👩‍👧",
    "🇫🇮",
    "🇸",
    "🏒🥅",
    "\u{fe0f}",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "▁",
    "▁▁",
    "Ġ",
    "<0x0A>",
    "<0xE2>",
    "_",
    "//",
    "...",
    "!?",
];

const CODE: [&str; 7] = [
    "fn main() {\n    println!(\"{}\", 1 << 4);\n}\n",
    "\tif (x != NULL && *x == '\\0') return;\r\n",
    "def f(a, *b, **c):\n        return [i for i in range(10)]\n\n\n",
    "<div class=\"a\">&nbsp;</div>\n",
    "SELECT * FROM t WHERE id >= 100000;",
    "$ git commit -m 'x' && ls -la /tmp/*.txt | wc -l",
    "{\"key\": [1, 2.5e-3, null, true]}",
];

/// What looks like an added token, or nearly.
const NEARLY: [&str; 16] = [
    "<", "<|", "|>", "<|end", "end|>", "<|end|", "|end|>", "</s", "</s>", "<s>", "<unk>", "s>", "<|END|>", "<|user|",
    "<|user>", "<||>",
];

/// `count` texts: words, code, any characters, runs of whitespace, `pieces` of the vocabulary, and `tokens`, the added
/// ones, in all mixtures.
pub fn texts(seed: u64, count: usize, pieces: &[&str], tokens: &[&str]) -> Vec<String> {
    let mut random = Random::new(seed);
    let mut texts: Vec<String> = ["", " ", "  ", "\n", "\0", "a", "é", "😀", "▁", " a", "a "].map(String::from).into();
    texts.extend(
        [" ", "\n", "\t", "a", "ab", "é", "😀", "\u{a0}", "1", "'", "A", "!", "aA"].map(|text| text.repeat(3000)),
    );
    texts.extend((1..80).map(|n| format!("{}x", " ".repeat(n))));
    texts.extend((1..20).map(|n| format!("a{}\n{}b", " ".repeat(n), "\t".repeat(n))));
    while texts.len() < count {
        let kind = random.below(6);
        texts.push(random.some(12, |random| {
            let text = match (kind, random.below(10)) {
                (0, _) | (5, 0) => random.char().to_string(),
                (1, _) | (5, 1) => random.pick(pieces).replace('▁', random.pick(&["▁", " ", " "])),
                (2, 0..4) | (5, 2) if !tokens.is_empty() => random.pick(tokens).to_owned(),
                (2, _) | (5, 3) => random.pick(&NEARLY).to_owned(),
                (3, 0) | (5, 4) => random.pick(&CODE).to_owned(),
                (4, _) | (5, 5) => random.some(6, |random| random.pick(&SPACES).to_owned()),
                _ => random.pick(&WORDS).to_owned(),
            };
            match random.below(4) {
                0 => text,
                1 => text + random.pick(&SPACES),
                2 if kind == 2 => random.pick(&SPACES).to_owned() + &text,
                _ => text + " ",
            }
        }));
    }
    texts
}
