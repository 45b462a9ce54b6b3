//! Names of the files of a split model.

/// `name-00001-of-00003.gguf`: one part of several.
#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub struct SplitName<'a> {
    /// The part of the name before the number, with the folders.
    pub stem: &'a str,
    /// From 1 to `count`.
    pub number: u32,
    pub count: u32,
}

impl<'a> SplitName<'a> {
    /// None for the name of a whole file.
    pub fn parse(name: &'a str) -> Option<Self> {
        let five_digits = |text: &str| {
            let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let (number, count) = (five_digits(number)?, five_digits(count)?);
        (1..=count).contains(&number).then_some(SplitName { stem, number, count })
    }

    /// The name of another part.
    pub fn part(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_split_file() {
        let split = SplitName::parse("a/b-00002-of-00003.gguf").expect("a part");
        assert_eq!(split, SplitName { stem: "a/b", number: 2, count: 3 });
        assert_eq!(split.part(1), "a/b-00001-of-00003.gguf");
        for whole in [
            "b.gguf",
            "b-00004-of-00003.gguf",
            "b-1-of-3.gguf",
            "b-00000-of-00000.gguf",
            "-of-.gguf",
            "b-+0001-of-00003.gguf",
        ] {
            assert_eq!(SplitName::parse(whole), None, "{whole}");
        }
    }
}
