//! The Python module `candle_phi._engine`: classes, exceptions and the interpreter's lock. It holds no logic of its own,
//! and may use every floor. One file a class.
//!
//! Decisions: docs/design/python.md

mod chat;
mod errors;
mod hub;
mod logits;
mod machine;
mod model;
mod ready;
mod scores;
mod stream;
mod task;
mod warm;

use pyo3::prelude::*;

use crate::error::Error;
use crate::system::panic;
use crate::system::task::Progress;

use chat::Chat;
use hub::Hub;
use logits::Logits;
use model::Model;
use ready::ReadyQueue;
use scores::Scores;
use stream::Stream;
use task::Task;
use warm::Warm;

/// Runs `work` without the interpreter's lock. A panic becomes an `InternalError`.
///
/// `work` never calls Python. It waits in pieces of at most 75 ms: between them Python handles signals and calls
/// callbacks. Only the thread that wakes event loops waits longer. A daemon thread that comes back while the interpreter
/// finalizes stays in `PyEval_RestoreThread`: PyO3 parks it there before Python 3.14, and Python itself from then on.
/// Until finalization begins it passes, so that an `atexit` handler can join it.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    Ok(py.detach(|| panic::catch(work))?)
}

/// A progress report: phase, done, total.
type Report = (&'static str, u64, Option<u64>);

fn report(progress: Progress) -> Report {
    (progress.phase.name(), progress.done, progress.total)
}

/// The compiled engine. `candle_phi.Phi` checks options and messages before they come here.
#[pymodule]
mod _engine {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{
        Chat, Hub, Logits, Model, ReadyQueue, Scores, Stream, Task, Warm, machine::doctor, machine::memory_available,
        machine::memory_needed,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        #[cfg(all(target_arch = "aarch64", target_feature = "fp16"))]
        if !crate::compute::kernels::has_fp16() {
            return Err(pyo3::exceptions::PyImportError::new_err(
                "candle_phi was built for CPUs with half-precision arithmetic (ARMv8.2, fp16), and this CPU has none. \
                 The published wheels run here: python -m pip install --force-reinstall --only-binary :all: candle-phi. \
                 A build from source does too with RUSTFLAGS='-C target-feature=+neon'.",
            ));
        }
        crate::system::panic::silence();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        let known = crate::files::hub::choice::KNOWN.iter().map(|known| (known.short, known.repo, known.file));
        module.add("KNOWN_MODELS", known.collect::<Vec<_>>())?;
        module.add("DEFAULT_REPO", crate::files::hub::DEFAULT_REPO)?;
        module.add("DEFAULT_FILE", crate::files::hub::DEFAULT_FILE)
    }
}
