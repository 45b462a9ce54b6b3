//! Any bytes as a tokenizer.json; what opens must encode and decode.
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::error::Error;
use candle_phi::files::gguf::Gguf;
use candle_phi::text::tokenizer::{Special, Tokenizer};
use libfuzzer_sys::fuzz_target;
use scratch::{Scratch, check_message, sound};

static SOUND: LazyLock<(Gguf, Arc<Tokenizer>)> = LazyLock::new(sound);
/// The whole text is the user's.
const ALL: &[std::ops::Range<usize>] = &[0..usize::MAX];
static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new("tokenizer.json"));

fuzz_target!(
    // A panic of the crate `tokenizers` is caught where it is called; one that is not caught still ends the run.
    init: std::panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| {
        FILE.write(bytes);
        let tokenizer = match Tokenizer::from_json(&FILE.path, &SOUND.0) {
            Ok(tokenizer) => tokenizer,
            Err(error) => return check_message(&error),
        };
        let text = "<|user|> hello\n\0 中😀</s>";
        for special in [Special::All, Special::None, Special::Outside(&[0..3, 6..9]), Special::Outside(ALL)] {
            match tokenizer.encode(text, special) {
                Ok(ids) => {
                    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.n_vocab()));
                    if special == Special::Outside(ALL) {
                        assert_eq!(ids, tokenizer.encode(text, Special::None).expect("ids"));
                    }
                    tokenizer.decode(&ids, true).expect("ids of its own");
                }
                Err(error) => assert!(!matches!(error, Error::Internal(_)), "{error}"),
            }
        }
    }
);
