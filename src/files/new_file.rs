//! A file that gets its name when it is whole. Until then it has a name of its own beside it, so a reader never sees a part
//! of it, whenever this process is killed.
//!
//! ```text
//! NAME                                the old file, until the new one takes its name
//! NAME.PROCESS-RANDOM.incomplete      the new file, locked while a process writes it
//! ```
//!
//! Decisions: docs/design/kv.md

use std::fs::{self, File};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result, human_size};
use crate::files::hub::cache::beside;

/// The end of the names of files that are not whole.
const INCOMPLETE: &str = ".incomplete";
/// Without locks, a file that is not whole and did not change for this long has no writer.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

pub struct NewFile {
    target: PathBuf,
    path: PathBuf,
    /// Locked.
    file: File,
}

impl NewFile {
    /// A file of about `size` bytes for `target`, which may exist. Only its owner may read it. If `target` is a symbolic
    /// link, the file that it leads to is the target.
    ///
    /// # Errors
    ///
    /// `Error::File`: there is no such folder, the folder or the target cannot be written, the target is not a regular
    /// file, or the disk has too little space.
    pub fn create(target: &Path, size: u64) -> Result<Self> {
        let target = resolve(target)?;
        let folder = folder_of(&target);
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        remove_abandoned(folder, |whole| whole == name);
        check_space(&target, folder, size)?;
        // Another process may take a new file for an abandoned one, between its creation and its lock.
        for _ in 0..8 {
            let path = beside(&target);
            let file = create_private(&path).map_err(|error| failed(&target, &error))?;
            let _ = file.lock(); // not every file system has locks
            if path.exists() {
                return Ok(NewFile { target, path, file });
            }
        }
        let message = format!("{}: not saved: another process removes its temporary files", target.display());
        Err(Error::File { message, kind: ErrorKind::Other })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| failed(&self.target, &error))
    }

    /// The next write goes to this byte of the file. Skipped bytes are zeros.
    pub fn seek(&mut self, offset: u64) -> Result<()> {
        self.file.seek(SeekFrom::Start(offset)).map(drop).map_err(|error| failed(&self.target, &error))
    }

    /// Brings the content to the disk, so that it survives a crash of the system.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| failed(&self.target, &error))
    }

    /// Gives the file its name, in place of a file that had it.
    pub fn place(self) -> Result<()> {
        fs::rename(&self.path, &self.target).map_err(|error| {
            if cfg!(windows) && self.target.exists() {
                let message = format!(
                    "{}: not saved: Windows cannot replace a file that is in use ({error}); close what was loaded from it, or \
                     save under another name",
                    self.target.display()
                );
                return Error::File { message, kind: error.kind() };
            }
            failed(&self.target, &error)
        })?;
        if let Ok(folder) = File::open(folder_of(&self.target)) {
            let _ = folder.sync_all(); // not every system can
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // once it has its name, there is none of this one
    }
}

/// Removes what killed writers left in a folder, of the whole files that `select` returns true for.
pub fn remove_abandoned(folder: &Path, select: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if whole_name(&name.to_string_lossy()).is_some_and(&select) && is_abandoned(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The name that a file will have when it is whole; None: it is not the name of a file that is written.
fn whole_name(name: &str) -> Option<&str> {
    let (whole, writer) = name.strip_suffix(INCOMPLETE)?.rsplit_once('.')?;
    let (process, random) = writer.split_once('-')?;
    let is_process = !process.is_empty() && process.bytes().all(|b| b.is_ascii_digit());
    let is_random = random.len() == 16 && random.bytes().all(|b| b.is_ascii_hexdigit());
    (is_process && is_random).then_some(whole)
}

fn is_abandoned(path: &Path) -> bool {
    let Ok(file) = File::options().write(true).open(path) else { return false };
    match file.try_lock() {
        Ok(()) => true,
        Err(fs::TryLockError::WouldBlock) => false,
        Err(fs::TryLockError::Error(_)) => {
            let modified = file.metadata().and_then(|file| file.modified());
            modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > ABANDONED))
        }
    }
}

/// The path of the file to replace, or of the new one.
fn resolve(target: &Path) -> Result<PathBuf> {
    let refused = |what: &str, kind| Error::File { message: format!("{}: {what}", target.display()), kind };
    if target.file_name().is_none() {
        return Err(refused("not saved: this is not the name of a file", ErrorKind::InvalidInput));
    }
    let folder = folder_of(target);
    if !folder.is_dir() {
        let kind = if folder.exists() { ErrorKind::NotADirectory } else { ErrorKind::NotFound };
        return Err(refused(&format!("not saved: {} is not a folder", folder.display()), kind));
    }
    let Ok(found) = fs::symlink_metadata(target) else { return Ok(target.to_owned()) };
    let target = if found.is_symlink() {
        let dangling = |error: io::Error| refused(&format!("not saved: a symbolic link, and {error}"), error.kind());
        fs::canonicalize(target).map_err(dangling)?
    } else {
        target.to_owned()
    };
    let found = fs::metadata(&target).map_err(|error| failed(&target, &error))?;
    if found.is_dir() {
        return Err(refused("not saved: this is a folder; pass the name of a file in it", ErrorKind::IsADirectory));
    }
    if !found.is_file() {
        return Err(refused("not saved: this is not a regular file", ErrorKind::InvalidInput));
    }
    if found.permissions().readonly() {
        return Err(refused("not saved: the file is read-only", ErrorKind::PermissionDenied));
    }
    Ok(target)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn create_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn check_space(target: &Path, folder: &Path, size: u64) -> Result<()> {
    match fs4::available_space(folder) {
        Ok(free) if free < size => Err(Error::File {
            message: format!(
                "{}: not saved: the file takes {}, and the disk has {} free",
                target.display(),
                human_size(size),
                human_size(free)
            ),
            kind: ErrorKind::StorageFull,
        }),
        _ => Ok(()),
    }
}

fn failed(target: &Path, error: &io::Error) -> Error {
    Error::File { message: format!("{}: not saved: {error}", target.display()), kind: error.kind() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_whether_a_file_is_whole() {
        let path = beside(Path::new("/a/chat.v1.safetensors"));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(whole_name(name), Some("chat.v1.safetensors"));
        for other in ["chat.incomplete", "a.1-2.incomplete", "a.-0123456789abcdef.incomplete", "a.1-0123456789abcdef"] {
            assert_eq!(whole_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_file_that_the_disk_has_no_room_for_is_not_begun() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("chat");
        let error = NewFile::create(&target, u64::MAX / 2).map(drop).unwrap_err();
        let Error::File { message, kind: ErrorKind::StorageFull } = error else { panic!("{error}") };
        let start = format!("{}: not saved: the file takes 9.22 EB, and the disk has ", target.display());
        assert!(message.starts_with(&start), "{message}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_writer_left_is_removed_and_what_is_written_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("chat");
        let left = beside(&target);
        fs::write(&left, "a part").unwrap();
        let foreign = [beside(&folder.path().join("other")), folder.path().join("chat.incomplete")];
        foreign.iter().for_each(|path| fs::write(path, "another file").unwrap());
        let mut first = NewFile::create(&target, 1).unwrap();
        assert!(!left.exists() && foreign.iter().all(|path| path.exists()));
        let second = NewFile::create(&target, 1).unwrap();
        assert!(first.path.exists(), "its writer lives");
        first.write(b"whole").unwrap();
        first.place().unwrap();
        drop(second);
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "the new file and two others");
    }
}
