//! The bundled model, cut and changed everywhere: every attempt ends in a model or in one clear error, soon, and within
//! the memory that the file justifies.
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_phi::engine::{Engine, LoadOptions};
use candle_phi::model::phi3::Config;
use candle_phi::runtime::generation::Request;
use candle_phi::system::task::Task;
use candle_phi::text::tokenizer::{Special, Tokenizer};
use gguf_writer::model::{Random, small_model};

use super::*;

/// A copy of the bundled model that can be written to, and where its tensors begin and end.
struct Demo {
    _folder: TempDir,
    path: PathBuf,
    file: File,
    bytes: Vec<u8>,
    starts: Vec<usize>,
    ends: Vec<usize>,
}

impl Demo {
    fn new() -> Self {
        // In memory where that is possible: it is cut and changed eighty thousand times.
        let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| folder());
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/candle_phi/demo/phi3-demo-q4_k_m.gguf");
        let bytes = std::fs::read(demo).unwrap();
        let path = save(folder.path(), "demo.gguf", &bytes);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        let gguf = Gguf::open(&path, true).unwrap();
        let whole = gguf.parts().next().unwrap().1.as_ptr() as usize;
        for tensor in gguf.tensors() {
            starts.push(tensor.bytes().as_ptr() as usize - whole);
            ends.push(starts[starts.len() - 1] + tensor.bytes().len());
        }
        Demo { _folder: folder, path, file, bytes, starts, ends }
    }

    fn set(&mut self, at: usize, byte: u8) {
        self.file.seek(SeekFrom::Start(at as u64)).unwrap();
        self.file.write_all(&[byte]).unwrap();
    }

    fn header(&self) -> usize {
        *self.starts.iter().min().unwrap()
    }
}

/// Fails if the work takes a minute. It takes milliseconds.
fn timed<T>(case: &dyn std::fmt::Display, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    assert!(start.elapsed() < Duration::from_secs(60), "{case}: {:?}", start.elapsed());
    result
}

#[test]
fn the_bundled_model_cut_at_every_byte_of_its_first_64_kib_and_at_every_tensor() {
    let demo = Demo::new();
    let mut random = Random::new(11);
    let mut cuts: Vec<usize> = (0..=64 << 10).collect();
    cuts.extend((0..500).map(|_| (64 << 10) + random.below(demo.bytes.len() - (64 << 10))));
    cuts.extend(demo.starts.iter().chain(&demo.ends).flat_map(|&at| [at - 1, at, at + 1]));
    cuts.retain(|&cut| cut <= demo.bytes.len());
    cuts.sort_unstable();
    cuts.dedup();
    let needed = *demo.ends.iter().max().unwrap();
    let mut whole = 0;
    for &cut in cuts.iter().rev() {
        demo.file.set_len(cut as u64).unwrap(); // from the end on, so that nothing is written twice
        match timed(&cut, || Gguf::open(&demo.path, cut % 2 == 0)) {
            Ok(_) => whole += usize::from(cut >= needed || panic!("opens when cut at {cut} of {needed}")),
            Err(error) => {
                let part = if cut == 0 { "empty" } else { "is the download incomplete?" };
                assert_error(&format!("cut at {cut}"), &demo.path, &error, Invalid, &[part]);
                assert!(cut < needed, "{cut}: {error}");
            }
        }
    }
    assert!(cuts.len() > 66_000 && whole >= 1, "{} cuts, {whole} of them of nothing", cuts.len());
}

#[test]
fn the_bundled_model_with_any_one_of_10_000_bytes_of_its_header_changed() {
    let mut demo = Demo::new();
    let mut random = Random::new(12);
    let (mut refused, mut works) = (0, 0);
    for _ in 0..10_000 {
        let (at, change) = (random.below(demo.header()), 1 + random.below(255) as u8);
        demo.set(at, demo.bytes[at] ^ change);
        let opened = timed(&at, || {
            let gguf = Gguf::open(&demo.path, true)?;
            readable(&gguf);
            Config::read(&gguf).map(drop)
        });
        match opened {
            Ok(()) => works += 1,
            Err(error) => {
                refused += 1;
                let message = error.to_string();
                assert!(message.starts_with(&demo.path.display().to_string()), "byte {at}: {message}");
                assert!(!message.contains('\n') && message.len() < 600, "byte {at}: {message}");
            }
        }
        demo.set(at, demo.bytes[at]);
    }
    assert!(refused > 500 && works > 500, "{refused} refused, {works} work");
    Config::read(&Gguf::open(&demo.path, true).unwrap()).unwrap(); // as it was
}

/// Everything that a header promises is there.
pub fn readable(gguf: &Gguf) {
    for (_, value) in gguf.metadata().iter() {
        if let Value::Array(array) = value {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    for tensor in gguf.tensors() {
        let size = tensor.dtype.block().map_or(0, |(n, bytes)| tensor.elements() / n * bytes);
        assert_eq!(tensor.bytes().len(), size);
    }
}

/// The whole way: load, render, tokenize, compute, sample, and turn into text.
fn generate(path: &Path) -> Result<(), Error> {
    let options = LoadOptions { n_threads: Some(1), kernel: Some("portable".into()), ..LoadOptions::default() };
    let engine = Engine::load(path, &options, &Task::default())?;
    let messages = [candle_phi::text::chat::Message { role: "user".into(), content: "hello <|end|>".into() }];
    let prompt = engine.tokenize_messages(&messages)?;
    let request = Request {
        prompt: prompt.into(),
        stop: vec!["stop".into()],
        ignore_eos: true,
        top_logprobs: Some(2),
        ..Request::default()
    };
    let stream = engine.stream(request, Some(3), None)?;
    while stream.next()?.is_some() {}
    Ok(())
}

#[test]
fn a_small_model_with_any_byte_changed_generates_or_says_why_not() {
    let folder = folder();
    let bytes = small_model().bytes();
    let header = small_model().data_start();
    let path = save(folder.path(), "m.gguf", &bytes);
    generate(&path).unwrap();
    let mut random = Random::new(13);
    let (mut refused, mut works) = (0, 0);
    for i in 0..600 {
        let mut bytes = bytes.clone();
        for _ in 0..1 + i % 3 {
            let at = if i % 2 == 0 { random.below(header) } else { random.below(bytes.len()) };
            bytes[at] = random.bits() as u8;
        }
        let path = save(folder.path(), &format!("{i}.gguf"), &bytes); // Windows may still hold the last one
        match timed(&i, || generate(&path)) {
            Ok(()) => works += 1,
            Err(Error::InvalidModel(_) | Error::UnsupportedModel(_) | Error::Value(_)) => refused += 1,
            Err(error) => panic!("change {i}: {error:?}"),
        }
    }
    assert!(refused > 60 && works > 60, "{refused} refused, {works} work");
}

#[test]
fn weights_that_are_no_numbers_are_text_or_an_error() {
    let folder = folder();
    let bytes = small_model().bytes();
    let start = small_model().data_start();
    for (case, byte) in [("NaN", 0xff), ("infinite scales", 0x7c), ("zeros", 0)] {
        let mut bytes = bytes.clone();
        bytes[start..].fill(byte);
        let path = save(folder.path(), &format!("{byte}.gguf"), &bytes);
        match generate(&path) {
            Ok(()) => {}
            Err(Error::InvalidModel(message)) => {
                let expected = format!("{byte}.gguf: every logit is NaN or -inf");
                assert!(message.contains(&expected), "{message}")
            }
            Err(error) => panic!("{case}: {error:?}"),
        }
    }
}

#[test]
fn a_file_that_shrank_is_noticed_before_it_is_read() {
    let folder = folder();
    let path = small_model().save(folder.path(), "m.gguf");
    let whole = std::fs::metadata(&path).unwrap().len();
    for mmap in [true, false] {
        let gguf = Gguf::open(&path, mmap).unwrap();
        gguf.check_length().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let shrunk = file.set_len(whole - 100);
        if cfg!(windows) && mmap {
            shrunk.expect_err("Windows keeps a file that is mapped as long as it was");
            continue;
        }
        shrunk.unwrap();
        match gguf.check_length() {
            Ok(()) => assert!(!mmap),
            Err(error) => {
                let parts = [&format!("shrank from {whole} to {} bytes", whole - 100)[..], "without mmap"];
                assert_error("shrank", &path, &error, Invalid, &parts);
            }
        }
        if !mmap {
            assert_eq!(gguf.parts().next().unwrap().1.len() as u64, whole, "a private copy is whole");
        }
        file.set_len(whole).unwrap();
        gguf.check_length().unwrap();
    }
}

/// Counts what this thread has allocated.
struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = NOW.try_with(|now| {
            now.set(now.get() + layout.size());
            PEAK.with(|peak| peak.set(peak.get().max(now.get())));
        });
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let _ = NOW.try_with(|now| now.set(now.get().saturating_sub(layout.size())));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `work` had allocated at once.
fn peak<T>(work: impl FnOnce() -> T) -> usize {
    NOW.set(0);
    PEAK.set(0);
    drop(work());
    PEAK.get()
}

#[test]
fn the_memory_of_a_header_is_bounded_by_its_size() {
    let folder = folder();
    let many = |n: u64, one: &dyn Fn(u64) -> Vec<u8>| (0..n).flat_map(one).collect::<Vec<u8>>();
    let mut keys = Writer::new().raw_key(&many(1 << 16, &|i| [&string(format!("{i:x}"))[..], &[0; 5]].concat()));
    keys.n_keys = Some(1 << 16);
    let mut rows = Writer::new();
    for i in 0..1u64 << 16 {
        let name = format!("{i:x}").into_bytes();
        rows = rows.row(Row { name, n_dims: 1, dims: vec![1], dtype: 24, offset: 32 * i });
    }
    let rows = [rows.header(), vec![0; 33 << 16]].concat();
    let strings = |n: usize, one: &[u8]| Writer::new().key("k", ARRAY, array(STRING, n as u64, &one.repeat(n))).bytes();
    for (case, bytes, opens) in [
        ("65536 keys", keys.bytes(), true),
        ("65536 tensors", rows, true),
        ("2^20 empty strings", strings(1 << 20, &[0; 8]), true),
        ("strings of one byte", strings(1 << 20, &string("a")), true),
        ("a large array", Writer::new().key("k", ARRAY, array(F64, 1 << 20, &vec![0; 8 << 20])).bytes(), true),
        ("a large string", Writer::new().key("k", STRING, string(vec![b'a'; 16 << 20])).bytes(), true),
        ("promises", Writer::new().key("k", ARRAY, array(STRING, 1 << 26, &[])).bytes(), false),
    ] {
        let path = save(folder.path(), "m.gguf", &bytes);
        let used = peak(|| assert_eq!(Gguf::open(&path, true).is_ok(), opens, "{case}"));
        assert!(used < (64 << 20) + 4 * bytes.len(), "{case}: {used} bytes for a file of {}", bytes.len());
        println!("{case}: {used} bytes for a file of {}", bytes.len());
    }
}

/// "a", "aa", "aaa": every token is made of every two others that fit, half a million merges of half a kilobyte.
#[test]
fn the_memory_of_a_vocabulary_is_bounded_by_its_size() {
    let folder = folder();
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let family = |letter: &str, n: usize| (1..=n).map(|k| letter.repeat(k)).collect::<Vec<_>>();
    let control = |n: usize| (0..n).map(|i| format!("<|{i}{}|>", "x".repeat(900))).collect::<Vec<_>>();
    for (case, more, says) in [
        ("families", family("a", 1000), "too many merges for"),
        ("short families", ('a'..='z').flat_map(|c| family(&c.to_string(), 100)).collect(), "too many merges"),
        ("control tokens", control(5000), "5000 added tokens of 4"),
    ] {
        let tokens: Vec<String> = bytes.clone().chain(more).collect();
        let n = tokens.len() as u64;
        let types: Vec<u8> = (0..n).flat_map(|id| if id < 256 { 6i32 } else { 1 }.to_le_bytes()).collect();
        let writer = Writer::new()
            .str("tokenizer.ggml.model", "llama")
            .key("tokenizer.ggml.tokens", ARRAY, strings(&tokens))
            .key("tokenizer.ggml.scores", ARRAY, array(F32, n, &vec![0; 4 * tokens.len()]))
            .key("tokenizer.ggml.token_type", ARRAY, array(I32, n, &types));
        let path = writer.save(folder.path(), "m.gguf");
        let gguf = Gguf::open(&path, true).unwrap();
        let mut result = None;
        let used = peak(|| result = Some(Tokenizer::from_gguf(&gguf)));
        let length = std::fs::metadata(&path).unwrap().len() as usize;
        assert!(used < (64 << 20) + 16 * length, "{case}: {used} bytes for a file of {length}");
        match result.unwrap() {
            Err(Error::InvalidModel(message)) => assert!(message.contains(says), "{case}: {message}"),
            other => panic!("{case}: {:?}", other.map(|tokenizer| tokenizer.encode("aaaa", Special::None))),
        }
    }
}
