//! Any text as a chat template, over a conversation of each kind.
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::chat::{Message, Template};
use candle_phi::gguf::Gguf;
use candle_phi::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use scratch::{check_message, sound};

static SOUND: LazyLock<(Gguf, Arc<Tokenizer>)> = LazyLock::new(sound);

fuzz_target!(|source: &str| {
    let (gguf, tokenizer) = &*SOUND;
    let template = match Template::new(Some(source), gguf, tokenizer.clone()) {
        Ok(template) => template,
        Err(error) => return check_message(&error),
    };
    let message = |role: &str| Message { role: role.into(), content: format!(" {role} <|end|>\n") };
    for roles in [&["user"][..], &["system", "user", "assistant", "user"], &["user", "assistant"], &[]] {
        let messages: Vec<Message> = roles.iter().map(|role| message(role)).collect();
        match template.render(&messages) {
            Ok(rendered) => {
                assert!(rendered.text.len() <= 8 << 20);
                assert!(rendered.literal.is_sorted());
                assert!(rendered.literal.iter().all(|&at| rendered.text.as_bytes()[at] == b'<'));
            }
            Err(error) => check_message(&error),
        }
    }
});
