//! Any ids and any stop strings: what is streamed is what decoding at once gives, up to the first stop string.
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::files::gguf::Gguf;
use candle_phi::text::detokenizer::Detokenizer;
use candle_phi::text::stop::StopStrings;
use candle_phi::text::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use scratch::sound;

static SOUND: LazyLock<(Gguf, Arc<Tokenizer>)> = LazyLock::new(sound);

/// The pieces that come out, and whether a stop string ended them.
fn watch<'a>(stops: &[String], pieces: impl Iterator<Item = &'a str>) -> (String, bool) {
    let mut watch = StopStrings::new(stops.to_vec());
    let mut text = String::new();
    for piece in pieces {
        let (certain, stopped) = watch.push(piece);
        text += &certain;
        if stopped {
            return (text, true);
        }
    }
    (text + &watch.finish(), false)
}

// The lines before the first empty one are stop strings. Each byte from there on is an id: the token of that byte, or from
// 240 on one of the last of the vocabulary, among them control tokens and longer pieces.
fuzz_target!(|input: &[u8]| {
    let (_, tokenizer) = &*SOUND;
    let split = input.windows(2).position(|pair| pair == b"\n\n").unwrap_or(0);
    let stops = String::from_utf8_lossy(&input[..split]);
    let stops: Vec<String> = stops.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    let last = tokenizer.n_vocab() as u32;
    let id = |&byte: &u8| if byte >= 240 { last - 1 - u32::from(byte - 240) } else { 3 + u32::from(byte) };
    let ids: Vec<u32> = input[split..].iter().map(id).collect();

    let mut detokenizer = Detokenizer::new(tokenizer.clone(), false);
    let pieces: Vec<String> = ids.iter().filter_map(|&id| detokenizer.push(id)).collect();
    let streamed = pieces.concat();
    let bytes: Vec<u8> =
        ids.iter().filter(|id| !tokenizer.is_special(**id)).flat_map(|&id| tokenizer.bytes(id).to_vec()).collect();
    let whole = String::from_utf8_lossy(&bytes);
    assert!(whole.starts_with(&streamed) && whole[streamed.len()..].chars().count() <= 3, "{streamed:?} of {whole:?}");

    let (text, stopped) = watch(&stops, pieces.iter().map(String::as_str));
    assert!(streamed.starts_with(&text) && (stopped || text == streamed));
    assert!(stops.iter().all(|stop| !text.contains(stop)), "{stops:?} in {text:?}");
    let mut characters = [0; 4];
    let by_one = streamed.chars().map(|c| c.encode_utf8(&mut characters).to_owned()).collect::<Vec<_>>();
    assert_eq!(watch(&stops, by_one.iter().map(String::as_str)), (text, stopped));
});
