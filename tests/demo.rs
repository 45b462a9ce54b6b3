//! The bundled model on any platform: opened from a folder whose name is not ASCII, and the text that it writes.

use std::fs;
use std::path::{Path, PathBuf};

use candle_phi::compute::kernels;
use candle_phi::engine::{Engine, LoadOptions};
use candle_phi::runtime::generation::Request;
use candle_phi::runtime::sampling::Sampling;
use candle_phi::system::task::Task;
use candle_phi::text::chat::Message;
use tempfile::TempDir;

const HAIKU: &str = "Write a haiku about ice hockey";
/// The text for a seed, under `portable`, on every platform: the same as in test_sampled.py.
const SAMPLED: [(u64, &str); 3] = [
    (1, "The Zamboni rolls\nshadows glide a final shift,\nsnow on the way home."),
    (2, "Sleepy kids lace up —\neach stride throwing silver snow,\nwinter waits outside."),
    (3, "A hush fills the rink\nwrists and shoulders coiled like springs\nthen the storm begins."),
];
/// A question with a clear most probable answer: the rounding of the kernels does not change it.
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
fn request(engine: &Engine, prompt: &str, temperature: f32, seed: u64) -> Request {
    let message = Message { role: "user".into(), content: prompt.into() };
    let prompt = engine.tokenize_messages(&[message]).unwrap();
    let sampling = Sampling { temperature, ..Sampling::default() };
    Request { prompt: prompt.into(), sampling, seed, ..Request::default() }
}

fn generate(engine: &Engine, prompt: &str, temperature: f32, seed: u64) -> String {
    let stream = engine.stream(request(engine, prompt, temperature, seed), None, None).unwrap();
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

/// Windows does not delete a file while it is mapped. The compute thread may hold it for a moment after `close`.
#[cfg(windows)]
#[test]
fn the_file_of_a_closed_model_can_be_deleted() {
    let demo = Demo::new();
    let engine = demo.open("portable", true);
    generate(&engine, QUESTION, 0.0, 1);
    engine.close();
    let removed = (0..1200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        fs::remove_file(&demo.path).is_ok() && !demo.path.exists()
    });
    assert!(removed);
}

/// Windows reports Ctrl-C on a thread of its own and interrupts no wait. The reader sees it between two waits.
#[cfg(windows)]
#[test]
fn ctrl_c_ends_a_stream() {
    use std::os::windows::process::CommandExt;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Poll;

    const CTRL_C: u32 = 0;
    const CREATE_NO_WINDOW: u32 = 0x0800_0000;
    const INSIDE: &str = "CANDLE_PHI_TEST_CTRL_C";
    static PRESSED: AtomicBool = AtomicBool::new(false);

    unsafe extern "system" {
        safe fn SetConsoleCtrlHandler(handler: Option<extern "system" fn(u32) -> i32>, add: i32) -> i32;
        safe fn GenerateConsoleCtrlEvent(event: u32, group: u32) -> i32;
    }
    extern "system" fn pressed(event: u32) -> i32 {
        PRESSED.store(event == CTRL_C, Ordering::Relaxed);
        1
    }

    // All processes of a console get the event, so this test runs in one with a console of its own.
    if std::env::var_os(INSIDE).is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "ctrl_c_ends_a_stream"]).env(INSIDE, "1").creation_flags(CREATE_NO_WINDOW);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        return;
    }
    assert_ne!(SetConsoleCtrlHandler(Some(pressed), 1), 0);
    assert_ne!(SetConsoleCtrlHandler(None, 0), 0); // a process may be started with Ctrl-C ignored
    let demo = Demo::new();
    let engine = demo.open("portable", true);
    let stream = engine.stream(Request { ignore_eos: true, ..request(&engine, HAIKU, 0.0, 1) }, None, None).unwrap();
    assert!(stream.next().unwrap().is_some());
    assert_ne!(GenerateConsoleCtrlEvent(CTRL_C, 0), 0);
    while !PRESSED.load(Ordering::Relaxed) {
        match stream.poll().unwrap() {
            Poll::Ready(piece) => assert!(piece.is_some(), "it ended by itself"),
            Poll::Pending => stream.wait().unwrap(),
        }
    }
    stream.cancel();
    assert_eq!(generate(&engine, QUESTION, 0.0, 1), ANSWER);
}
