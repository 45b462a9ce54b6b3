//! One writer at a time, across processes.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::error::Result;
use crate::task::Task;

const POLL: Duration = Duration::from_millis(100);

/// A file lock, given up when it is dropped. The file stays: to remove it would let two others each lock their own.
pub struct Lock {
    _file: File,
    /// Whether the lock keeps others out. Some network file systems grant it to everybody.
    pub is_real: bool,
}

/// Waits for the lock, and calls `waiting` while another process has it.
pub fn wait(path: &Path, task: &Task, mut waiting: impl FnMut()) -> Result<io::Result<Lock>> {
    let file = match open(path) {
        Ok(file) => file,
        Err(error) => return Ok(Err(error)),
    };
    let is_real = loop {
        match file.try_lock() {
            // a second handle must not get it
            Ok(()) => break matches!(open(path).map(|second| second.try_lock()), Ok(Err(TryLockError::WouldBlock))),
            Err(TryLockError::WouldBlock) => {
                waiting();
                task.sleep(POLL)?;
            }
            Err(TryLockError::Error(_)) => break false, // the file system has no locks
        }
    };
    Ok(Ok(Lock { _file: file, is_real }))
}

/// Whether another process holds it now.
pub fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

fn open(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    File::options().create(true).truncate(false).write(true).open(path)
}
