//! Any bytes as the Hub's list of a repository's files, and the choice of a model from it.
#![no_main]

use std::collections::BTreeSet;

use candle_phi::files::hub::listing::Listing;
use candle_phi::files::hub::{choice, name};
use libfuzzer_sys::fuzz_target;

const WANTED: [Option<&str>; 5] = [None, Some("*"), Some("a.gguf"), Some("*-00001-of-0000[1-3].gguf"), Some("[!a]?*f")];

fuzz_target!(|input: &[u8]| {
    let Ok(listing) = Listing::parse(input, || Ok(())).expect("nothing cancels it") else { return };
    assert!(name::is_commit(&listing.commit));
    assert!(listing.files.is_sorted_by_key(|file| &file.name));
    assert!(listing.files.iter().all(|file| name::is_inside(&file.name)));
    let files = listing.sizes();
    let names: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert!(choice::listing(&files).len() <= 32 << 10);
    for wanted in WANTED {
        match choice::among("org/model", &files, wanted, || Ok(())) {
            Ok(parts) => {
                assert!(!parts.is_empty() && parts.len() <= files.len());
                assert!(parts.iter().all(|part| names.contains(part.as_str()) && name::is_same_model(part, &parts[0])));
            }
            Err(error) => {
                let message = error.to_string();
                assert!(!message.contains('\n') && message.len() <= 32 << 10, "{message}");
            }
        }
    }
});
