//! The bundled model on any platform: opened from a folder whose name is not ASCII, and the text that it writes.

use std::fs;
use std::path::{Path, PathBuf};

use candle_phi::chat::Message;
use candle_phi::engine::{Engine, LoadOptions};
use candle_phi::generate::Request;
use candle_phi::kernels;
use candle_phi::sampling::Sampling;
use candle_phi::task::Task;
use tempfile::TempDir;

const HAIKU: &str = "Write a haiku about ice hockey";
/// The text for a seed, under `portable`, on every platform: the same as in test_sampled.py.
const SAMPLED: [(u64, &str); 3] = [
    (1, "The Zamboni rolls\nshadows glide a final shift,\nsnow on the way home."),
    (2, "Sleepy kids lace up —\neach stride throwing silver snow,\nwinter waits outside."),
    (3, "A hush fills the rink\nwrists and shoulders coiled like springs —\nsteel bursts into song."),
];
/// A question whose most probable answer no kernel's rounding changes.
const QUESTION: &str = "What is a Zamboni?";
const ANSWER: &str = "It drives over the rink between periods and leaves the ice smooth and shining.";

/// The model in a folder of its own, which is removed with it.
struct Demo {
    path: PathBuf,
    _folder: TempDir,
}

impl Demo {
    fn new() -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/candle_phi/demo/phi3-demo-q4_k_m.gguf");
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("Jérôme 田中");
        fs::create_dir(&inner).unwrap();
        let path = inner.join("modèle 🏒.gguf");
        fs::copy(model, &path).unwrap();
        Demo { path, _folder: folder }
    }

    fn open(&self, kernel: &str, mmap: bool) -> Engine {
        let options = LoadOptions { kernel: Some(kernel.into()), n_threads: Some(2), mmap, ..LoadOptions::default() };
        Engine::load(&self.path, &options, &Task::default()).unwrap()
    }
}

/// With the defaults of the Python API.
fn generate(engine: &Engine, prompt: &str, temperature: f32, seed: u64) -> String {
    let message = Message { role: "user".into(), content: prompt.into() };
    let prompt = engine.tokenize_messages(&[message]).unwrap();
    let repeat_penalty = if temperature == 0.0 { 1.0 } else { 1.2 };
    let sampling = Sampling { temperature, repeat_penalty, ..Sampling::default() };
    let request = Request {
        prompt,
        max_tokens: 0,
        limited: false,
        sampling,
        seed,
        stop: Vec::new(),
        ignore_eos: false,
        top_logprobs: None,
    };
    let stream = engine.stream(request, None, None).unwrap();
    let mut text = String::new();
    while let Some(piece) = stream.next().unwrap() {
        text += &piece.text;
    }
    text
}

#[test]
fn a_seed_gives_its_text_to_the_letter() {
    let demo = Demo::new();
    for mmap in [true, false] {
        let engine = demo.open("portable", mmap);
        for (seed, text) in SAMPLED {
            assert_eq!(generate(&engine, HAIKU, 1.0, seed), text, "seed {seed}, mmap {mmap}");
        }
    }
}

#[test]
fn every_kernel_of_this_cpu_writes_the_same() {
    let demo = Demo::new();
    for kernel in kernels::available() {
        assert_eq!(generate(&demo.open(kernel, true), QUESTION, 0.0, 1), ANSWER, "{kernel}");
    }
}

/// Windows keeps the name of a file that is mapped. The compute thread lets go of it a moment after `close`.
#[cfg(windows)]
#[test]
fn a_closed_model_lets_go_of_its_file() {
    let demo = Demo::new();
    let engine = demo.open("portable", true);
    generate(&engine, QUESTION, 0.0, 1);
    engine.close();
    let removed = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        fs::remove_file(&demo.path).is_ok() && !demo.path.exists()
    });
    assert!(removed);
}
