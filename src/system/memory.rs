//! The available memory, and allocations that fail with an error instead of an abort.
//!
//! Linux grants more memory than it has, and kills the process that uses it. So a large request is compared with the
//! available memory before it is allocated.
//!
//! Decisions: docs/design/model.md

use std::fmt::Display;
use std::fs::read_to_string;
use std::hint::black_box;
use std::path::{Path, PathBuf};

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
    probe_pieces(1, bytes, what)
}

/// An error if the allocator refuses `pieces` times `bytes` at this moment. Memory that is never written may exceed the
/// available memory, so this alone suits a buffer of which only a part is used.
pub fn probe_pieces(pieces: usize, bytes: u64, what: impl Display) -> Result<()> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut granted = Vec::new();
    for _ in 0..pieces {
        let mut piece = Vec::<u8>::new();
        piece.try_reserve_exact(length).map_err(|_| refused(bytes, &what))?;
        granted.push(black_box(piece)); // the compiler may drop an allocation that nothing uses
    }
    Ok(())
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
    /// What the memory limit of a cgroup leaves; `u64::MAX` without one.
    container: u64,
    /// What the swap limit of the cgroup leaves of `swap`.
    container_swap: u64,
}

impl Available {
    /// `root` is the folder that has `proc` and `sys`.
    fn read(root: &Path) -> Option<Self> {
        let meminfo = read_to_string(root.join("proc/meminfo")).ok()?;
        let kilobytes = |name: &str| {
            let value = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.split_whitespace().next()?.parse::<u64>().ok()
        };
        let swap = kilobytes("SwapFree").unwrap_or(0) << 10;
        let (container, container_swap) = container(root, swap);
        Some(Available { memory: kilobytes("MemAvailable")? << 10, swap, container, container_swap })
    }

    fn check(&self, bytes: u64, what: impl Display) -> Result<()> {
        let machine = self.memory.saturating_add(self.swap);
        let available = machine.min(self.container.saturating_add(self.container_swap));
        if bytes <= available {
            return Ok(());
        }
        Err(Error::Memory(format!("{what} needs {bytes} bytes of memory; {available} bytes are available")))
    }
}

/// What the limits of this process's container leave of the memory and of `swap`, of cgroup version 2 or 1.
fn container(root: &Path, swap: u64) -> (u64, u64) {
    let folder = |name: &str| root.join("sys/fs/cgroup").join(name);
    // No number: "max", or no such limit.
    let number = |file: PathBuf| read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let left = |folder: PathBuf, limit: &str, usage: &str| {
        let (limit, usage) = (number(folder.join(limit))?, number(folder.join(usage))?);
        let statistics = read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let value = |name: &str| {
            let value = statistics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.parse::<u64>().ok())
        };
        // These give way when memory is short: pages of files, those of a mapped model too, and the kernel's caches.
        let reclaimable = ["inactive_file", "active_file", "slab_reclaimable"]
            .iter()
            .filter_map(|name| value(&format!("total_{name}")).or_else(|| value(name)));
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable.sum())))
    };
    if let Some(memory) = left(folder(""), "memory.max", "memory.current") {
        let used = number(folder("memory.swap.current")).unwrap_or(0);
        let limit = number(folder("memory.swap.max")).unwrap_or(u64::MAX);
        return (memory, swap.min(limit.saturating_sub(used)));
    }
    let Some(memory) = left(folder("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes") else {
        return (u64::MAX, swap);
    };
    // The limit of version 1 is that of memory and swap together.
    let both = left(folder("memory"), "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes");
    let both = both.unwrap_or(u64::MAX);
    (memory.min(both), swap.min(both.saturating_sub(memory)))
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
        let statistics = "anon 7\ninactive_file 90\nactive_file 20\nslab_reclaimable 10\n";
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
        assert_eq!((version_1.container, version_1.container_swap), (350, 24_576));
        assert!(Available::read(Path::new("/no/such/root")).is_none());
    }

    #[test]
    fn the_swap_of_a_container_counts_as_far_as_its_limit() {
        let memory = [("sys/fs/cgroup/memory.max", "1000"), ("sys/fs/cgroup/memory.current", "700")];
        let version_2 = |max| {
            let swap = [("sys/fs/cgroup/memory.swap.max", max), ("sys/fs/cgroup/memory.swap.current", "50")];
            system(&[&memory[..], &swap].concat())
        };
        assert_eq!(version_2("0").container_swap, 0);
        assert_eq!(version_2("80").container_swap, 30);
        assert_eq!(version_2("max").container_swap, 24_576);
        assert_eq!(system(&memory).container_swap, 24_576);
        assert_eq!(version_2("80").check(330, "the cache"), Ok(()));
        assert!(
            version_2("80").check(331, "the cache").unwrap_err().to_string().ends_with("; 330 bytes are available")
        );
        let version_1 = |both| {
            system(&[
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "700"),
                ("sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", both),
                ("sys/fs/cgroup/memory/memory.memsw.usage_in_bytes", "750"),
            ])
        };
        assert_eq!(version_1("1100").container_swap, 50);
        assert_eq!((version_1("1000").container, version_1("1000").container_swap), (250, 0));
        assert_eq!(version_1("9223372036854771712").container_swap, 24_576);
    }

    #[test]
    fn a_request_beyond_the_available_memory_names_both_numbers() {
        let machine = system(&[]);
        assert_eq!(machine.check(1_048_576, "the cache"), Ok(()), "swap counts");
        let error = Error::Memory("the cache needs 1048577 bytes of memory; 1048576 bytes are available".into());
        assert_eq!(machine.check(1_048_577, "the cache"), Err(error));
        let limited = Available { container: 1000, container_swap: 0, ..machine };
        assert!(limited.check(1001, "the cache").unwrap_err().to_string().ends_with("; 1000 bytes are available"));
    }

    #[test]
    fn what_cannot_be_allocated_is_an_error_with_the_bytes() {
        for refused in [
            filled(0u64, usize::MAX / 4, "the table").map(drop),
            reserve(&mut vec![1u64], usize::MAX / 4, "the table"),
            probe(u64::MAX / 4, "the table"),
            probe_pieces(3, u64::MAX / 4, "the table"),
        ] {
            let message = refused.unwrap_err().to_string();
            assert!(message.starts_with("the table needs ") && message.contains(" bytes of memory"), "{message}");
        }
        assert_eq!(filled(7u8, 3, "three bytes").unwrap(), [7, 7, 7]);
    }
}
