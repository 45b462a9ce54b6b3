//! How fast this machine reads memory: the ceiling of decoding, since each token reads every weight once.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// The first pass brings the file into memory; the median of the others counts.
const PASSES: usize = 4;
/// What a thread takes at a time: long enough for the memory's prefetchers to run in.
const CHUNK: usize = 16 << 20;
/// A model below this may lie in a processor's cache; a buffer of this size is read in its place.
const SMALLEST: usize = 1 << 30;

/// The file's weights, read by `n_threads` threads as fast as they can: bytes per second, of the median pass.
pub fn measure(gguf: &Gguf, n_threads: usize) -> Result<f64> {
    let files: Vec<&[u8]> = gguf.parts().map(|(_, bytes)| bytes).collect();
    let filled;
    let memory = if files.iter().map(|bytes| bytes.len()).sum::<usize>() < SMALLEST {
        filled = filled_buffer(SMALLEST)?;
        vec![&filled[..]]
    } else {
        files
    };
    let chunks: Vec<&[u8]> = memory.iter().flat_map(|bytes| bytes.chunks(CHUNK)).collect();
    let mut seconds = [0; PASSES].map(|_| pass(&chunks, n_threads, read));
    let seconds = &mut seconds[1..];
    seconds.sort_by(f64::total_cmp);
    Ok(chunks.iter().map(|chunk| chunk.len()).sum::<usize>() as f64 / seconds[seconds.len() / 2])
}

/// Bytes of weights that one decoded token reads: all but the embedding table, which is one row, unless it is the head.
pub fn weight_bytes(gguf: &Gguf) -> usize {
    let tied = gguf.tensor("output.weight").is_none();
    gguf.tensors().filter(|tensor| tied || tensor.name != "token_embd.weight").map(|tensor| tensor.bytes().len()).sum()
}

/// Memory that is really there: untouched pages are all the same page of zeros.
fn filled_buffer(length: usize) -> Result<MmapMut> {
    let mut buffer = MmapMut::map_anon(length)
        .map_err(|error| Error::Internal(format!("no {length} bytes of memory for the bandwidth probe: {error}")))?;
    buffer.fill(1);
    Ok(buffer)
}

/// Seconds of one pass over everything. The threads take chunks in turn: a core that others use too holds nobody up.
fn pass(chunks: &[&[u8]], n_threads: usize, read: impl Fn(&[u8]) -> u64 + Sync) -> f64 {
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(chunk) = chunks.get(next.fetch_add(1, Relaxed)) {
            black_box(read(chunk));
        }
    };
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 1..n_threads {
            // Where the system refuses a thread, the others do its share.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    start.elapsed().as_secs_f64()
}

/// Reads both halves side by side, which keeps more reads under way than one run of addresses does. A compiler makes
/// vector loads of it; the result only keeps it from making nothing.
fn read(bytes: &[u8]) -> u64 {
    const LINE: usize = 64;
    let (lines, _) = bytes.as_chunks::<LINE>();
    let (low, high) = lines.split_at(lines.len() / 2);
    let mut sums = [[0; LINE / 8]; 2];
    for pair in low.iter().zip(high) {
        for (sum, line) in sums.iter_mut().zip([pair.0, pair.1]) {
            for (sum, word) in sum.iter_mut().zip(line.as_chunks::<8>().0) {
                *sum ^= u64::from_ne_bytes(*word);
            }
        }
    }
    sums.as_flattened().iter().fold(0, |all, sum| all ^ sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read() {
        let mut bytes = vec![0; 1024];
        for place in [0, 63, 511, 512, 1023] {
            bytes[place] = 1;
            assert_ne!(read(&bytes), 0, "byte {place}");
            bytes[place] = 0;
        }
        assert_eq!(read(&bytes), 0);
    }

    #[test]
    fn any_number_of_threads_reads_all_of_it() {
        let buffer = filled_buffer(3 * 4096).unwrap();
        for n_threads in [1, 2, 5] {
            let chunks: Vec<&[u8]> = buffer.chunks(4096).collect();
            let seen = AtomicUsize::new(0);
            pass(&chunks, n_threads, |chunk| seen.fetch_add(chunk.len(), Relaxed) as u64);
            assert_eq!(seen.into_inner(), buffer.len(), "{n_threads} threads");
        }
    }
}
