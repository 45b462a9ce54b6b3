//! From messages to a prompt: the text that a chat template makes of them, and the ranges of it that come from the
//! messages.
//!
//! The template is the caller's, else the file's, else the built-in one of the model's family ([`Template::new`]). All
//! three are Jinja and are rendered by the same engine. Three promises hold for any template:
//!
//! 1. *User text is never control text.* The characters of each message are marked (`marks.rs`) before the template sees
//!    them, and stay marked whatever it does with them. [`Rendered::user`] says where they are, and no added token that
//!    overlaps such a range is recognized. A role other than system, user and assistant is user text too.
//! 2. *A system message is never dropped.* Each ends in a sign of its own, which must be in the result.
//! 3. *A last message of the assistant is continued.* It ends in a sign, after which the result is cut off.
//!
//! A number that a template computes (the length of a message, the place of a word in it) is the template's own text.
//!
//! Decisions: docs/design/text.md

use std::ops::Range;
use std::sync::Arc;

use minijinja::context;
use minijinja::value::Value;

use crate::error::{Error, Result};
use crate::files::gguf::Gguf;
use crate::text::tokenizer::{Family, Tokenizer};
use jinja::Fault;
use marks::{CONTINUED, MAX_SIGNS, Origin, SLACK};

mod clock;
mod filters;
mod guard;
mod jinja;
mod marks;
mod meter;
mod methods;
mod strings;
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
    /// The byte ranges of `text` that are from the messages: ascending, apart from one another, none of them empty. For
    /// [`Special::Outside`](crate::text::tokenizer::Special).
    pub user: Vec<Range<usize>>,
}

/// How a model expects a conversation to be written.
#[derive(Debug)]
pub struct Template {
    source: String,
    tokens: TokenTexts,
    /// Why the file's template cannot be used. The file can still be opened for raw prompts.
    broken: Option<Error>,
}

/// The texts of the tokens that a template may use.
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
    /// `source`, else the file's `tokenizer.chat_template`, else the family's. Microsoft's Phi-3 files
    /// carry a template without a system branch, which silently loses system messages: for it the family's is used.
    ///
    /// # Errors
    ///
    /// `Value` for a `source` that is not Jinja. A problem of the file's template is an error of
    /// [`Template::render`], because raw prompts do not need it.
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
        let mut template = Template { source: built_in(family).to_owned(), tokens, broken: None };
        if let Some(source) = source {
            jinja::check(source)
                .map_err(|fault| fault.error(|what| Error::option("chat_template", format!("is not valid: {what}"))))?;
            template.source = source.to_owned();
            return Ok(template);
        }
        match gguf.metadata().str("tokenizer.chat_template") {
            Ok(None) => {}
            Ok(Some(source)) => {
                template.source = source.to_owned();
                template.broken = match jinja::check(source) {
                    Ok(()) => None,
                    Err(Fault::System(error)) => return Err(error),
                    Err(Fault::Template(what)) => Some(Error::InvalidModel(format!(
                        "{}: key `tokenizer.chat_template`: {what}; pass a chat_template",
                        gguf.path().display()
                    ))),
                };
                if family == Family::Spm && template.loses_system_messages() {
                    template.source = built_in(family).to_owned();
                }
            }
            Err(error) => template.broken = Some(error),
        }
        Ok(template)
    }

    /// Whether the template accepts a conversation without a system message only.
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
    /// # Errors
    ///
    /// `Value` if the template refuses the messages (`raise_exception`), exceeds a limit, or drops a system message
    /// or the message to be continued; `InvalidModel` if the file's template is not Jinja.
    pub fn render(&self, messages: &[Message]) -> Result<Rendered> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut values = Vec::with_capacity(messages.len());
        let mut system = Vec::new(); // the messages with a sign, by its number
        let mut continued = false;
        for (i, message) in messages.iter().enumerate() {
            let mut content = marks::mark(&message.content);
            let end = message.content.trim_end().len();
            if message.role == "system" && end > 0 {
                if system.len() == MAX_SIGNS {
                    return Err(Error::Value(format!("the conversation has more than {MAX_SIGNS} system messages")));
                }
                content = marks::mark(&message.content[..end]);
                content.push(marks::sign(system.len()));
                content += &marks::mark(&message.content[end..]);
                system.push(i);
            }
            if message.role == "assistant" && i + 1 == messages.len() {
                content.extend([CONTINUED, SLACK]);
                continued = true;
            }
            let role = match message.role.as_str() {
                known @ ("system" | "user" | "assistant") => known.to_owned(),
                other => marks::mark(other),
            };
            values.push(Value::from_iter([("role", Value::from(role)), ("content", Value::from(content))]));
        }

        let mut text = jinja::render(&self.source, self.variables(values, !continued))
            .map_err(|fault| fault.error(|what| Error::Value(format!("chat template: {what}"))))?;
        if let Some((_, i)) = system.iter().enumerate().find(|(number, _)| !text.contains(marks::sign(*number))) {
            return Err(Error::Value(format!(
                "this chat template drops system messages (message {i}); pass a chat_template that keeps them, or put \
                 the text into a user message"
            )));
        }
        if continued {
            let Some(end) = end_of_continued(&text) else {
                let i = messages.len() - 1;
                return Err(Error::Value(format!(
                    "this chat template drops the assistant's message {i}, which is to be continued"
                )));
            };
            text.truncate(end);
        }
        Ok(unmarked(&text))
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

/// Where the message to be continued ends, if it is in `text`: before trailing whitespace if the template trims.
fn end_of_continued(text: &str) -> Option<usize> {
    let (before, after) = text.rsplit_once(CONTINUED)?;
    Some(if after.starts_with(SLACK) { before.len() } else { before.trim_end_matches(marks::is_space).len() })
}

/// `text` without marks and signs.
fn unmarked(text: &str) -> Rendered {
    let mut rendered = Rendered { text: String::with_capacity(text.len()), user: Vec::new() };
    for letter in marks::letters(text).filter(|letter| letter.origin != Origin::Sign) {
        let start = rendered.text.len();
        rendered.text.push(letter.plain);
        let end = rendered.text.len();
        if letter.origin == Origin::Message {
            match rendered.user.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => rendered.user.push(start..end),
            }
        }
    }
    rendered
}
