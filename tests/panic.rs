//! Panics as errors with their places. A binary of its own: the panic hook is the process's.

use std::sync::Barrier;

use candle_phi::error::{Error, Result};
use candle_phi::system::panic::{catch, resume, silence};

#[test]
fn each_thread_has_its_own_place() {
    silence();
    let both = Barrier::new(2);
    let lines: Vec<u32> = std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let error = catch(|| -> Result<()> {
                let _wait = Wait(&both); // the other thread panics between this panic and its `catch`
                panic!("first")
            });
            line(error.unwrap_err(), "first")
        });
        let second = scope.spawn(|| {
            both.wait();
            let error = catch(|| -> Result<()> { panic!("second") });
            both.wait();
            line(error.unwrap_err(), "second")
        });
        vec![first.join().unwrap(), second.join().unwrap()]
    });
    assert!(lines[0] < lines[1], "{lines:?}");
}

/// Meets the other thread twice while the stack unwinds.
struct Wait<'a>(&'a Barrier);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.wait();
        self.0.wait();
    }
}

#[track_caller]
fn line(error: Error, message: &str) -> u32 {
    let text = error.to_string();
    let place = text.strip_prefix(&format!("internal error: {message} at tests/panic.rs:")).expect(&text);
    place.split(':').next().unwrap().parse().unwrap()
}

#[test]
fn a_resumed_panic_keeps_its_message_and_place() {
    silence();
    let error = catch(|| -> Result<()> { panic!("number {}", 7) }).unwrap_err();
    assert_eq!(catch(|| -> Result<()> { resume(error.clone()) }), Err(error));
}

#[test]
fn a_place_does_not_outlive_its_panic() {
    silence();
    assert!(std::panic::catch_unwind(|| panic!("caught elsewhere")).is_err());
    let error = catch(|| -> Result<()> { std::panic::resume_unwind(Box::new("another")) });
    assert_eq!(error, Err(Error::Internal("another".into())));
}
