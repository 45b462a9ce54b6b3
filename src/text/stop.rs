//! Stop strings in streamed text. Text that may become a stop string is held back, so that no part of one is emitted.

/// Searches a text that arrives in pieces.
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far that could be the beginning of a stop string.
    held: String,
}

impl StopStrings {
    pub fn new(stops: Vec<String>) -> Self {
        StopStrings { stops, held: String::new() }
    }

    /// Adds a piece. Returns the text that is certain not to belong to a stop string, and whether a stop string is
    /// complete. The first one to be complete counts, so the result does not depend on where the text was cut.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (piece.to_owned(), false);
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| text.find(stop).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = found.min() {
            text.truncate(start);
            return (text, true);
        }
        self.held = text.split_off(self.start_of_prefix(&text));
        (text, false)
    }

    /// The text that was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The start of the longest suffix of `text` that is a prefix of a stop string.
    fn start_of_prefix(&self, text: &str) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = text.len().saturating_sub(longest.saturating_sub(1));
        (earliest..text.len())
            .filter(|&start| text.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.starts_with(&text[start..])))
            .unwrap_or(text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The emitted text, and whether it was stopped, when `text` comes in pieces of `size` characters.
    fn run(stops: &[&str], text: &str, size: usize) -> (String, bool) {
        let mut search = StopStrings::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(size) {
            let (text, stopped) = search.push(&piece.iter().collect::<String>());
            out.push_str(&text);
            if stopped {
                return (out, true);
            }
        }
        (out + &search.finish(), false)
    }

    #[test]
    fn the_result_does_not_depend_on_how_the_text_was_cut() {
        let cases: [(&[&str], &str, &str, bool); 8] = [
            (&["STOP"], "abc STOP def", "abc ", true),
            (&["STOP"], "abc STO", "abc STO", false),
            (&["aab"], "aaab", "a", true),
            (&["\n\n"], "one\ntwo\n\nthree", "one\ntwo", true),
            (&["abcd", "bc"], "xabcd", "xa", true),
            (&["🏒🥅"], "go 🏒 🏒🥅", "go 🏒 ", true),
            (&["é"], "café", "caf", true),
            (&[], "anything", "anything", false),
        ];
        for (stops, text, expected, stopped) in cases {
            for size in 1..=text.chars().count() {
                assert_eq!(run(stops, text, size), (expected.to_owned(), stopped), "{text:?} by {size}");
            }
        }
    }

    #[test]
    fn text_that_can_no_longer_be_a_stop_string_is_emitted_at_once() {
        let mut search = StopStrings::new(vec!["</answer>".into()]);
        assert_eq!(search.push("x </an"), ("x ".into(), false));
        assert_eq!(search.push("d"), ("</and".into(), false));
    }
}
