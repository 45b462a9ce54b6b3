//! Locks between processes, and between threads.
//!
//! Decisions: docs/design/hub.md

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

use super::cache::unwritable;
use crate::error::Result;
use crate::system::task::Task;

const POLL: Duration = Duration::from_millis(100);

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Any number of holders, none of them exclusive.
    Shared,
    /// One holder.
    Exclusive,
}

/// A file lock, released on drop. The file stays: if it were removed, two others could each lock a file of their own.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// Whether the lock keeps others out. Some network file systems grant every lock.
    pub is_real: bool,
}

impl Lock {
    /// None: another holder is in the way.
    pub fn try_new(path: &Path, mode: Mode) -> Result<Option<Self>> {
        let file = open(path).map_err(|error| unwritable(path, &error))?;
        let locked = match mode {
            Mode::Shared => file.try_lock_shared(),
            Mode::Exclusive => file.try_lock(),
        };
        let is_real = match locked {
            // an exclusive lock must be refused now
            Ok(()) => matches!(open(path).map(|second| second.try_lock()), Ok(Err(TryLockError::WouldBlock))),
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(_)) => false, // the file system has no locks
        };
        Ok(Some(Lock { _file: file, is_real }))
    }

    /// Waits for the lock, and calls `waiting` again and again while another holder is in the way.
    pub fn wait(path: &Path, mode: Mode, task: &Task, mut waiting: impl FnMut()) -> Result<Self> {
        loop {
            if let Some(lock) = Lock::try_new(path, mode)? {
                return Ok(lock);
            }
            waiting();
            task.sleep(POLL)?;
        }
    }
}

/// Opens a lock file, and makes it if need be. One of another user may be readable alone, which is enough to lock it.
fn open(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    let file = File::options().create(true).truncate(false).write(true).open(path);
    file.or_else(|error| File::open(path).map_err(|_| error))
}
