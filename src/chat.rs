//! Messages -> prompt: the text a chat template makes of them, and where in it user text must stay text.
//!
//! Which template: the caller's, else the file's, else the one the family is known by ([`Template::new`]). All three are
//! Jinja and go through one engine. Three promises hold for any template, and are kept by characters that occur in
//! neither the messages nor the template and stand in for something while it is rendered:
//!
//! 1. *User text is never control text.* Each character of a message that could begin an added token ("<") is replaced,
//!    one for one, so that a template may trim, slice or compare as it likes. Afterwards the characters are put back, and
//!    [`Rendered::literal`] says where they stand.
//! 2. *A system message is never dropped.* Each ends in a character of its own, which must come out again.
//! 3. *A last message of the assistant is continued.* It ends in a character after which everything is cut off.
//!
//! Decisions: docs/design/text.md
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use minijinja::context;
use minijinja::value::Value;

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::{Family, Tokenizer};

mod clock;
mod guard;
mod jinja;
mod meter;
mod text;

/// One message of a conversation. `role` is "system", "user" or "assistant".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Byte offsets in `text`, ascending, at which no added token may start, for
    /// [`Special::Except`](crate::tokenizer::Special): the messages' own "<" and the like.
    pub literal: Vec<usize>,
}

/// How a model expects a conversation to be written.
#[derive(Debug)]
pub struct Template {
    source: String,
    tokenizer: Arc<Tokenizer>,
    tokens: TokenTexts,
    /// Why the file's template cannot be used: no reason not to open the file for raw prompts.
    broken: Option<Error>,
}

/// The tokens that a template may name.
#[derive(Debug)]
struct TokenTexts {
    eos: String,
    unknown: String,
    padding: String,
}

/// As microsoft/Phi-3-mini-4k-instruct writes it today.
const PHI3: &str = "\
{% for message in messages %}\
{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}";

/// As microsoft/phi-4 writes it.
const PHI4: &str = "\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}";

/// As microsoft/Phi-4-mini-instruct writes it.
const PHI4_MINI: &str = "\
{% for message in messages %}\
{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

fn built_in(family: Family) -> &'static str {
    match family {
        Family::Spm => PHI3,
        Family::Phi4 => PHI4,
        Family::Phi4Mini => PHI4_MINI,
    }
}

impl Template {
    /// `source` if there is one, else the file's `tokenizer.chat_template`, else the family's. Microsoft's Phi-3 files
    /// carry a template without a system branch, which silently loses system messages: for it the family's is used.
    ///
    /// Errors: `Value` for a `source` that is no Jinja. What is wrong with the file's template is an error of
    /// [`Template::render`], since raw prompts do not need it.
    pub fn new(source: Option<&str>, gguf: &Gguf, tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let family = tokenizer.family();
        let text_of = |key: &str| -> Result<String> {
            let id = gguf.metadata().u32(key)?;
            Ok(id.map(|id| String::from_utf8_lossy(tokenizer.bytes(id)).into_owned()).unwrap_or_default())
        };
        let tokens = TokenTexts {
            eos: text_of("tokenizer.ggml.eos_token_id")?,
            unknown: text_of("tokenizer.ggml.unknown_token_id")?,
            padding: text_of("tokenizer.ggml.padding_token_id")?,
        };
        let mut template = Template { source: built_in(family).to_owned(), tokenizer, tokens, broken: None };
        if let Some(source) = source {
            jinja::check(source).map_err(|what| Error::option("chat_template", format!("is not valid: {what}")))?;
            template.source = source.to_owned();
            return Ok(template);
        }
        match gguf.metadata().str("tokenizer.chat_template") {
            Ok(None) => {}
            Ok(Some(source)) => {
                template.source = source.to_owned();
                template.broken = jinja::check(source).err().map(|what| {
                    let path = gguf.path().display();
                    Error::InvalidModel(format!("{path}: key `tokenizer.chat_template`: {what}; pass a chat_template"))
                });
                if family == Family::Spm && template.loses_system_messages() {
                    template.source = built_in(family).to_owned();
                }
            }
            Err(error) => template.broken = Some(error),
        }
        Ok(template)
    }

    /// Whether the template takes a conversation, but not with a system message.
    fn loses_system_messages(&self) -> bool {
        let message = |role: &str| Message { role: role.to_owned(), content: "probe".to_owned() };
        self.render(&[message("system"), message("user")]).is_err() && self.render(&[message("user")]).is_ok()
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt that asks for the assistant's next message; if the last of `messages` is the assistant's, the prompt
    /// ends with it, so that the model continues it.
    ///
    /// No BOS is written: `bos_token` is empty in a template. A template that trims its messages also trims the end of
    /// one to be continued, as Hugging Face does; one that does not keeps its trailing spaces.
    ///
    /// Errors: `Value` for what the template itself refuses (`raise_exception`), a system message or a message to be
    /// continued that is not in the prompt, and a template that does not come to an end; `InvalidModel` when the file's
    /// template is no Jinja.
    pub fn render(&self, messages: &[Message]) -> Result<Rendered> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut unused = Unused::new(messages.iter().map(|m| &m.content).chain([&self.source]));
        let mut stand_ins = StandIns::default();
        let mut system_ends = Vec::new(); // (message, the character it ends in)
        let mut continued_at = None;
        let mut values = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let mut content = stand_ins.replace(&message.content, &self.tokenizer, &mut unused)?;
            let end = content.trim_end().len();
            if message.role == "system" && end > 0 {
                let mark = unused.take()?;
                content.insert(end, mark);
                system_ends.push((i, mark));
            }
            if message.role == "assistant" && i + 1 == messages.len() {
                let mark = unused.take()?;
                // The space tells whether the template trims.
                content.extend([mark, ' ']);
                continued_at = Some(mark);
            }
            values.push(Value::from_iter([
                ("role", Value::from(message.role.as_str())),
                ("content", Value::from(content)),
            ]));
        }

        let text = jinja::render(&self.source, self.variables(values, continued_at.is_none()))
            .map_err(|what| Error::Value(format!("chat template: {what}")))?;
        if let Some((i, _)) = system_ends.iter().find(|(_, mark)| !text.contains(*mark)) {
            return Err(Error::Value(format!(
                "this chat template has no place for a system message (message {i}); pass a chat_template that has, or say \
                 it in a user message"
            )));
        }
        let text = match continued_at {
            Some(mark) => cut(&text, mark).ok_or_else(|| {
                let i = messages.len() - 1;
                Error::Value(format!(
                    "this chat template leaves out the assistant's message {i}, which is to be continued"
                ))
            })?,
            None => text,
        };
        Ok(stand_ins.restore(&text, |c| system_ends.iter().any(|(_, mark)| *mark == c)))
    }

    fn variables(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Value {
        context! {
            messages,
            add_generation_prompt,
            bos_token => "",
            eos_token => self.tokens.eos,
            unk_token => self.tokens.unknown,
            pad_token => self.tokens.padding,
            tools => (),
            documents => (),
        }
    }
}

/// The text before the last `mark`; without trailing whitespace if the space after the mark is gone too.
fn cut(text: &str, mark: char) -> Option<String> {
    let (before, after) = text.rsplit_once(mark)?;
    let before = if after.starts_with(' ') { before } else { before.trim_end() };
    // A template may have written the message twice.
    Some(before.replace(&format!("{mark} "), "").replace(mark, ""))
}

/// Characters without a meaning that occur nowhere in the texts at hand: noncharacters first, then private ones.
struct Unused {
    occurring: HashSet<char>,
    candidates: std::iter::Chain<std::ops::RangeInclusive<char>, std::ops::RangeInclusive<char>>,
}

impl Unused {
    fn new<'a>(texts: impl Iterator<Item = &'a String>) -> Self {
        let occurring = texts.flat_map(|text| text.chars()).filter(|&c| c >= '\u{fdd0}').collect();
        let candidates = ('\u{fdd0}'..='\u{fdef}').chain('\u{f0000}'..='\u{10fffd}');
        Unused { occurring, candidates }
    }

    fn take(&mut self) -> Result<char> {
        let unused = self.candidates.find(|c| !self.occurring.contains(c));
        unused.ok_or_else(|| Error::Value("the messages use every private character of Unicode".to_owned()))
    }
}

/// Which character stands in for which.
#[derive(Default)]
struct StandIns {
    of: BTreeMap<char, char>,
    originals: BTreeMap<char, char>,
}

impl StandIns {
    fn replace(&mut self, content: &str, tokenizer: &Tokenizer, unused: &mut Unused) -> Result<String> {
        let mut text = String::with_capacity(content.len() + 8);
        for c in content.chars() {
            // Templates trim whitespace, so it stays what it is.
            if c.is_whitespace() || !tokenizer.may_start_added(c) {
                text.push(c);
                continue;
            }
            let stand_in = match self.of.get(&c) {
                Some(stand_in) => *stand_in,
                None => unused.take()?,
            };
            self.of.insert(c, stand_in);
            self.originals.insert(stand_in, c);
            text.push(stand_in);
        }
        Ok(text)
    }

    fn restore(&self, text: &str, is_mark: impl Fn(char) -> bool) -> Rendered {
        let mut rendered = Rendered { text: String::with_capacity(text.len()), literal: Vec::new() };
        for c in text.chars() {
            if let Some(original) = self.originals.get(&c) {
                rendered.literal.push(rendered.text.len());
                rendered.text.push(*original);
            } else if !is_mark(c) {
                rendered.text.push(c);
            }
        }
        rendered
    }
}
