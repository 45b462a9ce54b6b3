//! No template can hang or fill memory. A binary of its own: it measures the allocations of the whole process.
//!
//! Work is measured in bytes allocated, not in seconds: it is the same on every machine. A step that does not pay for
//! what it makes shows in it, and a template that is not stopped never ends.
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_phi::error::Error;
use candle_phi::files::gguf::Gguf;
use candle_phi::text::chat::{Message, Template};
use candle_phi::text::tokenizer::Tokenizer;

#[path = "mod.rs"]
mod attacks;
#[path = "../gguf_writer/mod.rs"]
mod gguf_writer;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static TOTAL: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TOTAL.fetch_add(layout.size(), Relaxed);
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MAX_PEAK: usize = 256 << 20;
const MAX_TOTAL: usize = 1 << 30;

#[test]
fn no_template_hangs_or_fills_memory() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = gguf_writer::model::small_model().save(folder.path(), "m.gguf");
    let gguf = Gguf::open(&model, true).expect("a sound file");
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf).expect("a sound tokenizer"));
    let messages = [Message { role: "user".into(), content: "x".into() }];
    let attacks = attacks::attacks();
    assert!(attacks.len() >= 80, "{}", attacks.len());
    let (mut most, mut highest) = ((0, ""), (0, ""));
    for (name, source) in &attacks {
        assert!(source.len() <= 64 << 10, "{name}: {} bytes", source.len());
        let before = NOW.load(Relaxed);
        PEAK.store(before, Relaxed);
        TOTAL.store(0, Relaxed);
        let result =
            Template::new(Some(source), &gguf, tokenizer.clone()).and_then(|template| template.render(&messages));
        let (peak, total) = (PEAK.load(Relaxed) - before, TOTAL.load(Relaxed));
        (most, highest) = (most.max((total, name)), highest.max((peak, name)));
        match result {
            Err(error @ (Error::Value(_) | Error::Option { .. })) => {
                let message = error.to_string();
                assert!(message.len() < 300 && !message.contains('\n'), "{name}: {message}");
            }
            Err(other) => panic!("{name}: {other:?}"),
            Ok(rendered) => assert!(rendered.text.len() <= 8 << 20, "{name}: {} bytes", rendered.text.len()),
        }
        assert!(peak <= MAX_PEAK && total <= MAX_TOTAL, "{name}: {peak} bytes at once, {total} in all");
    }
    println!("at once: {highest:?}, in all: {most:?}");
}
