//! Checksums of the Hub: SHA-256 for large files, and the hash of git for small ones.

use std::fs::File;
use std::io::{self, Read};

use sha2::Digest;

use super::name::is_hex;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// 64 hexadecimal digits.
    Sha256(String),
    /// 40 hexadecimal digits: SHA-1 over `blob SIZE\0` and the content.
    Git(String),
}

impl Checksum {
    /// None: not a checksum.
    pub fn parse(text: &str) -> Option<Self> {
        if is_hex(text, 64) {
            return Some(Checksum::Sha256(text.into()));
        }
        is_hex(text, 40).then(|| Checksum::Git(text.into()))
    }

    /// Also the name of the file in `blobs`.
    pub fn hex(&self) -> &str {
        match self {
            Checksum::Sha256(hex) | Checksum::Git(hex) => hex,
        }
    }

    /// The hasher for a content of `size` bytes.
    pub fn hasher(&self, size: u64) -> Hasher {
        match self {
            Checksum::Sha256(_) => Hasher::Sha256(sha2::Sha256::new()),
            Checksum::Git(_) => Hasher::Git(sha1::Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }
}

pub enum Hasher {
    Sha256(sha2::Sha256),
    Git(sha1::Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hash) => hash.update(bytes),
            Hasher::Git(hash) => hash.update(bytes),
        }
    }

    pub fn finish(self) -> Checksum {
        let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Hasher::Sha256(hash) => Checksum::Sha256(hex(&hash.finalize())),
            Hasher::Git(hash) => Checksum::Git(hex(&hash.finalize())),
        }
    }

    /// Hashes the rest of a file, and calls `read` with the size of each piece.
    pub fn read<E: From<io::Error>>(
        &mut self,
        file: &mut File,
        mut read: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    self.update(&buffer[..n]);
                    read(n as u64)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
