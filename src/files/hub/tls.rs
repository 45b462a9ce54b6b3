//! Trusted certificates: those that the environment names, else the platform's, else the built-in ones.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use ureq::tls::{Certificate, PemItem, RootCerts, parse_pem};

use super::environment;
use crate::error::{Error, Result};

/// Variables that name certificates, which then replace the platform's.
const VARIABLES: [&str; 3] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"];

/// A note on the variables that are set, for an error.
pub fn trusted() -> String {
    let set: Vec<_> = VARIABLES.into_iter().filter(|name| env::var_os(name).is_some_and(|v| !v.is_empty())).collect();
    if set.is_empty() {
        String::new()
    } else {
        format!(" (only the certificates of {} are trusted)", set.join(" and "))
    }
}

pub fn roots() -> Result<RootCerts> {
    let mut certificates = Vec::new();
    let mut given = false;
    for variable in VARIABLES {
        let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) else { continue };
        given = true;
        let before = certificates.len();
        if variable == "SSL_CERT_DIR" {
            env::split_paths(&value).for_each(|folder| read_folder(&folder, &mut certificates));
        } else {
            let path = environment::path(variable).unwrap_or_else(|| PathBuf::from(&value));
            if path.is_dir() {
                read_folder(&path, &mut certificates);
            } else {
                let pem = fs::read(&path)
                    .map_err(|error| Error::download(format!("{variable}: cannot read {}: {error}", path.display())))?;
                read(&pem, &mut certificates);
            }
        }
        // a folder may be empty if a file is set too: some systems set both
        if certificates.len() == before && variable != "SSL_CERT_DIR" {
            return Err(Error::download(format!("{variable}: no certificate in {}", value.display())));
        }
    }
    if !given {
        return Ok(platform());
    }
    if certificates.is_empty() {
        return Err(Error::download("SSL_CERT_DIR: no certificate in it".into()));
    }
    Ok(RootCerts::from(certificates.into_iter()))
}

fn read_folder(folder: &Path, certificates: &mut Vec<Certificate<'static>>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if let Ok(pem) = fs::read(entry.path()) {
            read(&pem, certificates);
        }
    }
}

fn read(pem: &[u8], certificates: &mut Vec<Certificate<'static>>) {
    certificates.extend(parse_pem(pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    }));
}

/// The verifier of Windows, macOS and the like.
#[cfg(not(all(unix, not(target_vendor = "apple"))))]
fn platform() -> RootCerts {
    RootCerts::PlatformVerifier
}

/// The distribution's certificates; a bare container may have none.
#[cfg(all(unix, not(target_vendor = "apple")))]
fn platform() -> RootCerts {
    let found = rustls_native_certs::load_native_certs().certs;
    or_built_in(found.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect())
}

#[cfg(all(unix, not(target_vendor = "apple")))]
fn or_built_in(found: Vec<Certificate<'static>>) -> RootCerts {
    if found.is_empty() { RootCerts::WebPki } else { RootCerts::from(found) }
}

#[cfg(all(test, unix, not(target_vendor = "apple")))]
mod tests {
    use super::*;

    #[test]
    fn a_system_without_certificates_takes_those_that_are_built_in() {
        assert!(matches!(or_built_in(Vec::new()), RootCerts::WebPki));
        let one = vec![Certificate::from_der(b"of the system")];
        assert!(matches!(or_built_in(one), RootCerts::Specific(certificates) if certificates.len() == 1));
    }
}
