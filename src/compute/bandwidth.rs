//! The memory bandwidth of this machine. It bounds decoding, since each token reads every weight once.
//!
//! Decisions: docs/design/compute.md

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::files::gguf::Gguf;
use crate::system::memory;

/// The first pass loads the file into memory. The result is the median of the others.
const PASSES: usize = 4;
/// Bytes that a thread takes at a time: long enough for the hardware prefetchers.
const CHUNK: usize = 16 << 20;
/// A smaller model may fit a processor's cache. A buffer of this size is read instead.
const SMALLEST: usize = 1 << 30;

/// Bytes per second at which `n_threads` threads read the file's weights: the median of the passes.
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

/// Bytes of weights that one decoded token reads: all tensors, but the embedding table only if it is the head too.
pub fn weight_bytes(gguf: &Gguf) -> usize {
    let tied = gguf.tensor("output.weight").is_none();
    gguf.tensors().filter(|tensor| tied || tensor.name != "token_embd.weight").map(|tensor| tensor.bytes().len()).sum()
}

/// Written memory: unwritten pages would all be the same page of zeros.
fn filled_buffer(length: usize) -> Result<MmapMut> {
    memory::check(length as u64, "the buffer of the bandwidth measurement")?;
    let mut buffer = MmapMut::map_anon(length).map_err(|error| {
        Error::Memory(format!("the buffer of the bandwidth measurement needs {length} bytes of memory: {error}"))
    })?;
    buffer.fill(1);
    Ok(buffer)
}

/// Seconds of one pass over all chunks. The threads take chunks in turn, so that a slow core takes fewer.
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
            // If the system refuses a thread, the others take its chunks.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    start.elapsed().as_secs_f64()
}

/// Reads both halves side by side, which keeps more loads in flight than one run of addresses. The compiler vectorizes
/// it; the result keeps the compiler from dropping the loads.
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
