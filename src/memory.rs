//! The available memory, and allocations that fail with an error instead of an abort.
//!
//! Linux grants more memory than it has, and kills the process that uses it. So a large request is compared with the
//! available memory before it is allocated.
//!
//! Decisions: docs/design/model.md

use std::fmt::Display;
use std::fs::read_to_string;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use crate::error::{Error, Result};

/// Requests below this many bytes are allocated without a look at the available memory, which takes some 50 us.
const LARGE: u64 = 16 << 20;

/// An error if `bytes` are many and the system has less. `what` names the request.
pub fn check(bytes: u64, what: impl Display) -> Result<()> {
    if bytes < LARGE {
        return Ok(());
    }
    match Available::read(Path::new("/")) {
        Some(available) => available.check(bytes, what),
        None => Ok(()),
    }
}

/// [`check`], and a trial allocation of `bytes`: for code that allocates without handling a refusal.
pub fn probe(bytes: u64, what: impl Display) -> Result<()> {
    check(bytes, &what)?;
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    Vec::<u8>::new().try_reserve_exact(length).map_err(|_| refused(bytes, what))
}

/// Room for `more` elements.
pub fn reserve<T>(vector: &mut Vec<T>, more: usize, what: impl Display) -> Result<()> {
    if vector.capacity() - vector.len() >= more {
        return Ok(());
    }
    let bytes = (more as u64).saturating_mul(size_of::<T>() as u64);
    check(bytes, &what)?;
    vector.try_reserve_exact(more).map_err(|_| refused(bytes, what))
}

/// A vector of `length` times `value`.
pub fn filled<T: Clone>(value: T, length: usize, what: impl Display) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    reserve(&mut vector, length, what)?;
    vector.resize(length, value);
    Ok(vector)
}

/// Raises an error of this module where the caller cannot return one: in a kernel. `catch` makes it a result again.
pub fn raise(error: Error) -> ! {
    resume_unwind(Box::new(error))
}

/// Runs `work`, and returns the error that a kernel raised.
pub fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| match payload.downcast::<Error>() {
        Ok(error) => Err(*error),
        Err(panic) => resume_unwind(panic),
    })
}

fn refused(bytes: u64, what: impl Display) -> Error {
    Error::Memory(format!("{what} needs {bytes} bytes of memory, which the system refused"))
}

/// Bytes that this process may still use. None if the system is not Linux.
pub fn available() -> Option<u64> {
    Available::read(Path::new("/")).map(|available| available.memory.min(available.container))
}

struct Available {
    /// Of the machine: free, or in caches that give way.
    memory: u64,
    swap: u64,
    /// What the limit of a cgroup leaves; `u64::MAX` without one.
    container: u64,
}

impl Available {
    /// `root` is the folder that has `proc` and `sys`.
    fn read(root: &Path) -> Option<Self> {
        let meminfo = read_to_string(root.join("proc/meminfo")).ok()?;
        let kilobytes = |name: &str| {
            let value = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Available {
            memory: kilobytes("MemAvailable")? << 10,
            swap: kilobytes("SwapFree").unwrap_or(0) << 10,
            container: container(root),
        })
    }

    fn check(&self, bytes: u64, what: impl Display) -> Result<()> {
        let available = self.memory.saturating_add(self.swap).min(self.container);
        if bytes <= available {
            return Ok(());
        }
        Err(Error::Memory(format!("{what} needs {bytes} bytes of memory; {available} bytes are available")))
    }
}

/// What the memory limit of this process's container leaves, of cgroup version 2 or 1.
fn container(root: &Path) -> u64 {
    let left = |folder: &str, limit: &str, usage: &str| {
        let folder = root.join("sys/fs/cgroup").join(folder);
        let number = |name: &str| read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        let (limit, usage) = (number(limit)?, number(usage)?); // no number: "max"
        let statistics = read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let file = |name: &str| {
            let value = statistics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.parse::<u64>().ok())
        };
        // Pages of files give way when memory is short, those of a mapped model too.
        let files = ["inactive_file", "active_file"]
            .iter()
            .filter_map(|name| file(&format!("total_{name}")).or_else(|| file(name)));
        Some(limit.saturating_sub(usage.saturating_sub(files.sum())))
    };
    let version_2 = left("", "memory.max", "memory.current");
    let version_1 = left("memory", "memory.limit_in_bytes", "memory.usage_in_bytes");
    version_2.into_iter().chain(version_1).min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal: 32 kB\nMemAvailable:    1000 kB\nSwapFree: 24 kB\n";

    fn system(files: &[(&str, &str)]) -> Available {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [("proc/meminfo", MEMINFO)].iter().chain(files) {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Available::read(root.path()).unwrap()
    }

    #[test]
    fn the_memory_of_a_machine_and_the_limit_of_a_container() {
        let machine = system(&[]);
        assert_eq!((machine.memory, machine.swap, machine.container), (1_024_000, 24_576, u64::MAX));
        let statistics = "anon 7\ninactive_file 100\nactive_file 20\n";
        let version_2 = |max| {
            system(&[
                ("sys/fs/cgroup/memory.max", max),
                ("sys/fs/cgroup/memory.current", "700\n"),
                ("sys/fs/cgroup/memory.stat", statistics),
            ])
            .container
        };
        assert_eq!(version_2("1000\n"), 420);
        assert_eq!(version_2("600\n"), 20, "above its limit by what gives way");
        assert_eq!(version_2("max\n"), u64::MAX);
        let version_1 = system(&[
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "700"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 0\n"),
        ]);
        assert_eq!(version_1.container, 350);
        assert!(Available::read(Path::new("/no/such/root")).is_none());
    }

    #[test]
    fn a_request_beyond_the_available_memory_names_both_numbers() {
        let machine = system(&[]);
        assert_eq!(machine.check(1_048_576, "the cache"), Ok(()), "swap counts");
        let error = Error::Memory("the cache needs 1048577 bytes of memory; 1048576 bytes are available".into());
        assert_eq!(machine.check(1_048_577, "the cache"), Err(error));
        let limited = Available { container: 1000, ..machine };
        assert!(limited.check(1001, "the cache").unwrap_err().to_string().ends_with("; 1000 bytes are available"));
    }

    #[test]
    fn what_cannot_be_allocated_is_an_error_with_the_bytes() {
        for refused in [
            filled(0u64, usize::MAX / 4, "the table").map(drop),
            reserve(&mut vec![1u64], usize::MAX / 4, "the table"),
            probe(u64::MAX / 4, "the table"),
        ] {
            let message = refused.unwrap_err().to_string();
            assert!(message.starts_with("the table needs ") && message.contains(" bytes of memory"), "{message}");
        }
        assert_eq!(filled(7u8, 3, "three bytes").unwrap(), [7, 7, 7]);
    }

    #[test]
    fn an_error_that_a_kernel_raised_is_the_result_and_a_panic_stays_one() {
        let error = Error::Memory("no room".into());
        let raised = error.clone();
        assert_eq!(catch(|| -> Result<()> { raise(raised) }), Err(error));
        assert_eq!(catch(|| Ok(3)), Ok(3));
        assert!(catch_unwind(|| catch(|| -> Result<()> { panic!("a bug") })).is_err());
    }
}
