//! Any bytes as a file of keys and values: opened, and if that works each column is read. The checksums of most inputs are
//! corrected first, so that a mutation reaches what is behind them.
//!
//! Decisions: docs/design/kv.md
#![no_main]
mod scratch;

use std::hash::Hasher;
use std::sync::LazyLock;

use candle_phi::compute::ops::{KvShape, KvType};
use candle_phi::error::Result;
use candle_phi::kv::file::KvFile;
use libfuzzer_sys::fuzz_target;
use scratch::{Scratch, check_message};
use twox_hash::XxHash3_64;

static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new("chat.safetensors"));
const TYPES: [KvType; 3] = [KvType::F16, KvType::F32, KvType::Q8_0];

fn run(bytes: &[u8]) -> Result<()> {
    FILE.write(bytes);
    let file = KvFile::open(&FILE.path)?;
    assert!(file.ids().len() <= bytes.len() && file.runs().iter().sum::<usize>() <= file.ids().len());
    assert!(file.columns().len() <= bytes.len());
    let mut last = Ok(());
    for number in file.columns() {
        for kv_type in TYPES {
            // The shapes of the seeds.
            for (n_layers, n_head_kv, head_dim) in [(1, 1, 2), (2, 1, 2), (1, 2, 40)] {
                let shape = KvShape { n_layers, n_head_kv, head_dim, kv_type, device: None };
                match file.column(number, &shape) {
                    Ok(column) => {
                        let copy = column.copy()?;
                        for layer in 0..n_layers {
                            for head in 0..n_head_kv {
                                column.layer(layer).k.head(head, n_head_kv)?;
                                copy.layer(layer).v.head(head, n_head_kv)?;
                            }
                        }
                    }
                    error => last = error.map(drop),
                }
            }
        }
    }
    last
}

/// Corrects the checksums, as far as the header says where they are.
fn correct(bytes: &mut [u8]) -> Option<()> {
    let size = usize::try_from(u64::from_le_bytes(*bytes.first_chunk()?)).ok()?;
    let data = size.checked_add(8).filter(|&data| data <= bytes.len())?;
    let after = |text: &str, from: usize, bytes: &[u8]| {
        let found = bytes.get(from..data)?.windows(text.len()).position(|part| part == text.as_bytes())?;
        Some(from + found + text.len())
    };
    let ids = after("\"ids\":", 8, bytes)?;
    let offset = after("\"data_offsets\":[", ids, bytes)?;
    let digits = bytes[offset..data].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let columns: usize = str::from_utf8(&bytes[offset..offset + digits]).ok()?.parse().ok()?;
    let ids = data.checked_add(columns).filter(|&ids| ids <= bytes.len())?;

    let sums = after("candle_phi.checksums\":\"", 8, bytes)?;
    let n = bytes[sums..data].iter().take_while(|byte| byte.is_ascii_hexdigit()).count() / 16;
    for i in 0..n {
        let column = &bytes[data + columns / n * i..][..columns / n];
        let sum = format!("{:016x}", XxHash3_64::oneshot(column));
        bytes[sums + 16 * i..][..16].copy_from_slice(sum.as_bytes());
    }
    let end = bytes.len().checked_sub(8).filter(|&end| end >= ids)?;
    let mut hash = XxHash3_64::new();
    hash.write(&bytes[..data]);
    hash.write(&bytes[ids..end]);
    bytes[end..].copy_from_slice(&hash.finish().to_le_bytes());
    Some(())
}

fuzz_target!(|bytes: &[u8]| {
    let mut corrected = bytes.to_vec();
    for bytes in [Some(bytes.to_vec()), correct(&mut corrected).map(|()| corrected)].into_iter().flatten() {
        if let Err(error) = run(&bytes) {
            check_message(&error);
        }
    }
});
