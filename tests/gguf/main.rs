//! The GGUF reader: what it reads, and for every kind of wrong file the error a user sees.
use std::path::Path;

use candle_phi::error::Error;
use candle_phi::files::gguf::{GgmlType, Gguf, Value};
use tempfile::TempDir;

mod damage;
mod fields;
#[path = "../gguf_writer/mod.rs"]
mod gguf_writer;
use gguf_writer::*;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    let folder = folder();
    let path = save(folder.path(), "m.gguf", bytes);
    let read = Gguf::open(&path, false);
    let mapped = Gguf::open(&path, true);
    assert_eq!(mapped.as_ref().err(), read.as_ref().err(), "mmap changes the error");
    mapped
}

#[derive(Debug, Copy, Clone, PartialEq)]
enum Kind {
    NotFound,
    Invalid,
    Unsupported,
}
use Kind::*;

/// The error is of this kind, one line, names the file and says all of `parts`.
fn assert_error(case: &str, path: &Path, error: &Error, kind: Kind, parts: &[&str]) {
    let found = match error {
        Error::ModelNotFound(_) => NotFound,
        Error::InvalidModel(_) => Invalid,
        Error::UnsupportedModel(_) => Unsupported,
        other => panic!("{case}: {other:?}"),
    };
    let message = error.to_string();
    assert_eq!(found, kind, "{case}: {message}");
    assert!(message.starts_with(&format!("{}: ", path.display())), "{case}: no path first: {message}");
    assert!(!message.contains('\n') && message.len() < 500, "{case}: not one short line: {message}");
    for part in parts {
        assert!(message.contains(part), "{case}: no {part:?} in: {message}");
    }
}

/// Each case: a name, the file's bytes, the error, and what its message says.
fn assert_errors(cases: Vec<(&str, Vec<u8>, Kind, &[&str])>) {
    let folder = folder();
    for (case, bytes, kind, parts) in cases {
        let path = save(folder.path(), "m.gguf", &bytes);
        for mmap in [true, false] {
            match Gguf::open(&path, mmap) {
                Ok(_) => panic!("{case}: opens"),
                Err(error) => assert_error(case, &path, &error, kind, parts),
            }
        }
    }
}

/// A small file with a value of every type and tensors of three types.
fn small() -> Writer {
    let floats: Vec<u8> = (0..64).flat_map(|i| (i as f32).to_le_bytes()).collect();
    Writer::new()
        .str("general.architecture", "phi3")
        .key("a.u8", U8, [200])
        .key("a.i8", I8, [(-5i8) as u8])
        .key("a.u16", U16, 60000u16.to_le_bytes())
        .key("a.i16", I16, (-300i16).to_le_bytes())
        .u32("a.u32", 4_000_000_000)
        .key("a.i32", I32, 7i32.to_le_bytes())
        .key("a.u64", U64, 4096u64.to_le_bytes())
        .key("a.i64", I64, (-1i64).to_le_bytes())
        .key("a.f32", F32, 1e-5f32.to_le_bytes())
        .key("a.f64", F64, 2.5f64.to_le_bytes())
        .key("a.yes", BOOL, [1])
        .key("a.no", BOOL, [0])
        .key("a.bytes", STRING, string([b'a', 0xff, 0]))
        .key("a.tokens", ARRAY, strings(&[&b"<unk>"[..], b"", b"end\0", b"\xe2\x96"]))
        .key("a.scores", ARRAY, array(F32, 3, &[0f32, -1.5, f32::NEG_INFINITY].map(f32::to_le_bytes).concat()))
        .key("a.types", ARRAY, array(I32, 2, &[2i32, -3].map(i32::to_le_bytes).concat()))
        .key("a.types8", ARRAY, array(U8, 2, &[1, 255]))
        .key("a.large", ARRAY, array(U32, 1, &u32::MAX.to_le_bytes()))
        .key("a.flags", ARRAY, array(BOOL, 2, &[1, 0]))
        .key("a.none", ARRAY, array(STRING, 0, &[]))
        .tensor("plain", &[32, 2], 0, &floats)
        .tensor("unknown", &[32], 39, &[9; 17])
        .tensor("blocks", &[256, 3, 1, 1], 12, &[7; 3 * 144])
}

#[test]
fn reads_every_type_of_key_in_file_order() {
    let gguf = open(&small().bytes()).unwrap();
    let m = gguf.metadata();
    let keys: Vec<&str> = m.iter().map(|(key, _)| key).collect();
    assert_eq!(keys[..4], ["general.architecture", "a.u8", "a.i8", "a.u16"]);
    assert_eq!((keys.len(), m.len()), (21, 21));

    assert_eq!(m.str("general.architecture").unwrap(), Some("phi3"));
    assert_eq!(m.u32("a.u8").unwrap(), Some(200));
    assert_eq!(m.u32("a.u16").unwrap(), Some(60000));
    assert_eq!(m.u32("a.u32").unwrap(), Some(4_000_000_000));
    assert_eq!(m.u32("a.i32").unwrap(), Some(7));
    assert_eq!(m.u32("a.u64").unwrap(), Some(4096));
    assert_eq!(m.f32("a.f32").unwrap(), Some(1e-5));
    assert_eq!(m.f32("a.f64").unwrap(), Some(2.5));
    assert_eq!(m.f32("a.u64").unwrap(), Some(4096.0));
    assert_eq!(m.bool("a.yes").unwrap(), Some(true));
    assert_eq!(m.bool("a.no").unwrap(), Some(false));
    assert!(matches!(m.get("a.i8"), Some(Value::I8(-5))));
    assert!(matches!(m.get("a.i16"), Some(Value::I16(-300))));
    assert!(matches!(m.get("a.i64"), Some(Value::I64(-1))));
    assert!(matches!(m.get("a.bytes"), Some(Value::String(bytes)) if bytes == b"a\xff\0"));

    let tokens = m.strings("a.tokens").unwrap().unwrap();
    assert_eq!(tokens.iter().collect::<Vec<_>>(), [&b"<unk>"[..], b"", b"end\0", b"\xe2\x96"]);
    assert_eq!((tokens.len(), tokens.get(2), tokens.get(4)), (4, Some(&b"end\0"[..]), None));
    assert!(m.strings("a.none").unwrap().unwrap().is_empty());
    assert_eq!(m.f32s("a.scores").unwrap().unwrap(), [0.0, -1.5, f32::NEG_INFINITY]);
    assert_eq!(m.i32s("a.types").unwrap().unwrap(), [2, -3]);
    assert_eq!(m.i32s("a.types8").unwrap().unwrap(), [1, 255]);
    match m.get("a.flags") {
        Some(Value::Array(flags)) => {
            assert!(matches!(flags.iter().collect::<Vec<_>>()[..], [Value::Bool(true), Value::Bool(false)]));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(m.u32("absent").unwrap(), None);
    assert!(m.get("absent").is_none() && m.strings("absent").unwrap().is_none());
}

#[test]
fn a_getter_says_what_it_found_instead() {
    let folder = folder();
    let path = small().save(folder.path(), "m.gguf");
    let gguf = Gguf::open(&path, true).unwrap();
    let m = gguf.metadata();
    let cases = [
        (m.u32("a.i8").err(), "key `a.i8` is i8 -5; it must be an integer from 0 to 4294967295"),
        (m.u32("a.i64").err(), "key `a.i64` is i64 -1"),
        (m.u32("a.f32").err(), "key `a.f32` is f32 0.00001"),
        (m.u32("a.yes").err(), "key `a.yes` is bool true"),
        (m.u32("general.architecture").err(), "key `general.architecture` is str \"phi3\""),
        (m.f32("a.no").err(), "key `a.no` is bool false; it must be a number"),
        (m.bool("a.u8").err(), "key `a.u8` is u8 200; it must be a bool"),
        (m.str("a.u8").err(), "key `a.u8` is u8 200; it must be a str of UTF-8"),
        (m.str("a.bytes").err(), "key `a.bytes` is str of 3 bytes that is not UTF-8"),
        (m.strings("a.scores").err(), "key `a.scores` is arr[f32, 3]; it must be an array of str"),
        (m.strings("a.u8").err(), "key `a.u8` is u8 200"),
        (m.f32s("a.tokens").err(), "key `a.tokens` is arr[str, 4]; it must be an array of f32"),
        (m.i32s("a.scores").err(), "key `a.scores` is arr[f32, 3]; it must be an array of integers"),
        (m.i32s("a.large").err(), "key `a.large` is arr[u32, 1]; it must be an array of integers that fit i32"),
        (m.i32s("a.flags").err(), "key `a.flags` is arr[bool, 2]"),
    ];
    for (error, part) in cases {
        assert_error(part, &path, &error.expect(part), Invalid, &[part]);
    }
}

#[test]
fn reads_tensors_where_they_lie() {
    for version in [2, 3] {
        for mmap in [true, false] {
            let folder = folder();
            let path = small().version(version).save(folder.path(), "m.gguf");
            let gguf = Gguf::open(&path, mmap).unwrap();
            assert_eq!(gguf.path(), path);
            assert_eq!(
                gguf.parts().map(|(p, bytes)| (p.to_owned(), bytes.len())).collect::<Vec<_>>(),
                [(path.clone(), small().bytes().len())]
            );
            assert_eq!(gguf.tensors().map(|t| &t.name[..]).collect::<Vec<_>>(), ["plain", "unknown", "blocks"]);

            let plain = gguf.tensor("plain").unwrap();
            assert_eq!((plain.dtype, &plain.shape[..], plain.elements()), (GgmlType::F32, &[2, 32][..], 64));
            assert_eq!(plain.bytes()[4 * 33..][..4], 33f32.to_le_bytes());
            assert_eq!(plain.bytes().as_ptr() as usize % 8, 0);

            let blocks = gguf.tensor("blocks").unwrap();
            assert_eq!((blocks.dtype, &blocks.shape[..]), (GgmlType::Q4K, &[1, 1, 3, 256][..]));
            assert_eq!(blocks.bytes(), [7; 3 * 144]);

            let unknown = gguf.tensor("unknown").unwrap();
            assert_eq!((unknown.dtype, unknown.dtype.name()), (GgmlType::Other(39), "MXFP4".to_owned()));
            assert!(unknown.dtype.block().is_none() && unknown.bytes().is_empty());
            assert!(gguf.tensor("absent").is_none());

            let kept = blocks.data();
            drop(gguf);
            assert_eq!(kept[..], [7; 3 * 144], "bytes outlive the reader");
        }
    }
}

#[test]
fn block_sizes_are_those_of_ggml() {
    // (number in the file, name, elements, bytes): ggml's type traits.
    let types = [
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (30, "BF16", 1, 2),
    ];
    for (id, name, elements, bytes) in types {
        let gguf =
            open(&Writer::new().tensor("w", &[512, 3], id, &vec![1; 3 * 512 / elements * bytes]).bytes()).unwrap();
        let tensor = gguf.tensor("w").unwrap();
        assert_eq!((tensor.dtype.name(), tensor.dtype.block()), (name.to_owned(), Some((elements, bytes))));
        assert_eq!(tensor.bytes().len(), 3 * 512 / elements * bytes, "{name}");
    }
}

#[test]
fn any_integer_type_may_hold_the_alignment() {
    let types: [(u32, Vec<u8>); 7] = [
        (U8, vec![64]),
        (I8, vec![64]),
        (U16, 64u16.to_le_bytes().into()),
        (I16, 64i16.to_le_bytes().into()),
        (I32, 64i32.to_le_bytes().into()),
        (U64, 64u64.to_le_bytes().into()),
        (I64, 64i64.to_le_bytes().into()),
    ];
    for (kind, value) in types {
        let mut writer = Writer::new().key("general.alignment", kind, value);
        writer.alignment = 64;
        let writer = writer.tensor("a", &[2], 0, &[1; 8]).tensor("b", &[2], 0, &[2; 8]);
        let gguf = open(&writer.bytes()).unwrap();
        assert_eq!(gguf.tensor("b").unwrap().bytes(), [2; 8], "type {kind}");
    }
}

#[test]
fn reads_a_real_vocabulary() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/phi3/ggml-vocab-phi-3.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not here", path.display());
        return;
    }
    let gguf = Gguf::open(&path, true).unwrap();
    let m = gguf.metadata();
    assert_eq!((m.len(), gguf.tensors().len()), (26, 0));
    assert_eq!(m.str("general.architecture").unwrap(), Some("phi3"));
    assert_eq!(m.u32("phi3.embedding_length").unwrap(), Some(3072));
    let tokens = m.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!((tokens.len(), tokens.get(32007)), (32064, Some(&b"<|end|>"[..])));
    assert_eq!(m.f32s("tokenizer.ggml.scores").unwrap().unwrap().len(), 32064);
    assert_eq!(m.i32s("tokenizer.ggml.token_type").unwrap().unwrap()[3], 6);
}

#[test]
fn says_what_a_file_is_that_is_no_gguf() {
    let safetensors = [&2u64.to_le_bytes()[..], b"{}"].concat();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:8a83\nsize 2393231072\n";
    assert_errors(vec![
        ("empty", vec![], Invalid, &["the file is empty"]),
        ("one byte", b"G".into(), Invalid, &["ends at 1", "is the download incomplete?"]),
        ("html", b"<!DOCTYPE html><html>".into(), Invalid, &["this is an HTML page, not a model"]),
        ("html, BOM", "\u{feff}\n <HTML lang=en>".into(), Invalid, &["this is an HTML page, not a model"]),
        ("html, comment", "<!-- x -->\n<head><title>".into(), Invalid, &["this is an HTML page, not a model"]),
        ("xml", b"<?xml version=\"1.0\"?><Error>".into(), Invalid, &["XML text", "server's error message"]),
        ("template", b"{{ bos_token }}{% for message in messages %}".into(), Invalid, &["a Jinja template"]),
        ("json", b"{\"error\": \"gated repo\"}".into(), Invalid, &["JSON text", "server's error message"]),
        ("git lfs", pointer.into(), Invalid, &["Git LFS pointer", "2.39 GB", "git lfs pull"]),
        ("git lfs, no size", b"version https://git-lfs".into(), Invalid, &["Git LFS pointer", "git lfs pull"]),
        ("safetensors", safetensors, Invalid, &["safetensors file", "only GGUF files are supported"]),
        ("zip", b"PK\x03\x04rest".into(), Invalid, &["zip archive or a PyTorch checkpoint"]),
        ("pickle", b"\x80\x02}q\x00".into(), Invalid, &["Python pickle"]),
        ("gzip", b"\x1f\x8b\x08\x00".into(), Invalid, &["compressed file; unpack it first"]),
        ("zstd", b"\x28\xb5\x2f\xfd".into(), Invalid, &["compressed file"]),
        ("zeros", vec![0; 5000], Invalid, &["the first 1024 bytes are zeros", "did not finish"]),
        ("text", b"hello\x00".into(), Invalid, &["not a GGUF file: it starts with \"hell\""]),
        ("ggml", b"lmgg\x00".into(), Unsupported, &["old GGML format", "convert"]),
        ("ggmf", b"fmgg\x00".into(), Unsupported, &["old GGML format"]),
        ("ggjt", b"tjgg\x00".into(), Unsupported, &["old GGML format"]),
        ("ggla", b"algg\x00".into(), Unsupported, &["old GGML format"]),
        ("big-endian magic", b"FUGG\x00".into(), Unsupported, &["big-endian"]),
    ]);
}

#[test]
fn refuses_a_wrong_start() {
    let with = |change: fn(&mut Writer)| {
        let mut writer = small();
        change(&mut writer);
        writer.bytes()
    };
    assert_errors(vec![
        ("version 0", with(|w| w.version = 0), Invalid, &["version 0 at 4"]),
        ("version 1", with(|w| w.version = 1), Unsupported, &["version 1 at 4", "2 and 3 are supported"]),
        ("version 4", with(|w| w.version = 4), Unsupported, &["version 4 at 4"]),
        ("version max", with(|w| w.version = u32::MAX), Unsupported, &["version 4294967295"]),
        ("big-endian", with(|w| w.version = 3 << 24), Unsupported, &["big-endian", "version 3 at 4"]),
        ("only the magic", b"GGUF".into(), Invalid, &["the version needs 4 bytes at 4; the file ends at 4"]),
        ("2^63 tensors", with(|w| w.n_tensors = Some(1 << 63)), Invalid, &["9223372036854775808 tensors", "at 8"]),
        ("2^16+1 tensors", with(|w| w.n_tensors = Some((1 << 16) + 1)), Invalid, &["65537 tensors", "65536"]),
        ("too many tensors", with(|w| w.n_tensors = Some(40)), Invalid, &["40 tensors declared"]),
        ("2^64-1 keys", with(|w| w.n_keys = Some(u64::MAX)), Invalid, &["18446744073709551615 keys", "at 16"]),
        ("2^32 keys", with(|w| w.n_keys = Some(1 << 32)), Invalid, &["4294967296 keys", "the limit is 65536"]),
        (
            "too many keys",
            with(|w| w.n_keys = Some(500)),
            Invalid,
            &["500 keys declared", "is the download incomplete?"],
        ),
    ]);
}

#[test]
fn refuses_wrong_keys() {
    let length = |n: u64| n.to_le_bytes().to_vec();
    let key = |key: &[u8], kind: u32, value: Vec<u8>| Writer::new().key(key, kind, value).bytes();
    let arr = |element: u32, len: u64, bytes: &[u8]| Writer::new().key("k", ARRAY, array(element, len, bytes)).bytes();
    let raw = |bytes: &[u8]| Writer::new().raw_key(bytes).bytes();
    let twice = Writer::new().u32("k", 1).u32("other", 2).u32("k", 1).bytes();
    let named = |n: u64| raw(&[length(n), vec![b'k'; 100]].concat());
    assert_errors(vec![
        ("name of 2^63", named(1 << 63), Invalid, &["the name of key 0 at 24 is 9223372036854775808 bytes long"]),
        ("name of 2^64-1", named(u64::MAX), Invalid, &["18446744073709551615 bytes long; the limit is 65535"]),
        ("name of 65536", named(65536), Invalid, &["65536 bytes long; the limit is 65535"]),
        ("name cut", named(101), Invalid, &["the name of key 0 needs 101 bytes at 32; the file ends at 132"]),
        ("no name", key(b"", U32, vec![0; 4]), Invalid, &["the name of key 0 at 24 is empty"]),
        ("name not UTF-8", key(b"\xff", U32, vec![0; 4]), Invalid, &["the name of key 0 at 24 is not UTF-8"]),
        ("name with a line break", key(b"a\nb", 13, vec![0; 4]), Invalid, &["key `a\\nb` has value type 13"]),
        ("twice", twice, Invalid, &["duplicate key `k` at byte 62"]),
        ("type 13", key(b"k", 13, vec![0; 4]), Invalid, &["key `k` has value type 13 at 33"]),
        ("type 2^32-1", key(b"k", u32::MAX, vec![0; 4]), Invalid, &["value type 4294967295"]),
        ("type cut", raw(&[string("key"), vec![4, 0, 0]].concat()), Invalid, &["the type of key `key` needs 4 bytes"]),
        ("u32 cut", key(b"k", U32, vec![0; 3]), Invalid, &["key `k` needs 4 bytes at 37; the file ends at 40"]),
        ("f64 cut", key(b"k", F64, vec![0; 7]), Invalid, &["key `k` needs 8 bytes at 37; the file ends at 44"]),
        ("bool 2", key(b"k", BOOL, vec![2]), Invalid, &["key `k` is a bool of byte [2] at 37"]),
        ("string of 2^64-1", key(b"k", STRING, length(u64::MAX)), Invalid, &["key `k` at 37 is 18446744073709551615"]),
        ("string of 2^31", key(b"k", STRING, length(1 << 31)), Invalid, &["2147483648 bytes long", "16777216"]),
        ("string too long", key(b"k", STRING, length((16 << 20) + 1)), Invalid, &["16777217 bytes long"]),
        ("string cut", key(b"k", STRING, length(5)), Invalid, &["key `k` needs 5 bytes at 45; the file ends at 45"]),
        ("elements of type 13", arr(13, 1, &[0; 8]), Invalid, &["key `k` has elements of type 13 at 37"]),
        ("array of arrays", arr(ARRAY, 1, &[0; 20]), Unsupported, &["key `k` is an array of arrays at 37"]),
        ("array of 2^63", arr(U8, 1 << 63, &[]), Invalid, &["key `k` has 9223372036854775808 elements (byte 41)"]),
        ("array of 2^64-1", arr(F64, u64::MAX, &[]), Invalid, &["18446744073709551615 elements"]),
        ("array too long", arr(U8, (64 << 20) + 1, &[]), Invalid, &["67108865 elements", "the limit is 67108864"]),
        (
            "u8 array cut",
            arr(U8, 9, &[0; 8]),
            Invalid,
            &["9 elements of key `k` declared", "only 8 bytes follow at 49"],
        ),
        ("f32 array cut", arr(F32, 3, &[0; 11]), Invalid, &["3 elements of key `k`", "at least 4 bytes each"]),
        ("f64 array of 2^26", arr(F64, 1 << 26, &[0; 8]), Invalid, &["67108864 elements of key `k` declared"]),
        ("str array cut", arr(STRING, 3, &[0; 23]), Invalid, &["3 elements of key `k`", "only 23 bytes follow"]),
        ("its string cut", arr(STRING, 1, &length(1)), Invalid, &["element 0 of key `k` needs 1 bytes at 57"]),
        ("its string of 2^62", arr(STRING, 1, &length(1 << 62)), Invalid, &["element 0 of key `k` at 49 is 46116860"]),
        ("bool array", arr(BOOL, 3, &[0, 1, 7]), Invalid, &["element 2 of key `k` is a bool of byte 7"]),
    ]);
}

#[test]
fn refuses_wrong_tensors() {
    let row = |name: &[u8], dims: &[u64], dtype: u32, offset: u64| Row {
        name: name.into(),
        n_dims: dims.len() as u32,
        dims: dims.into(),
        dtype,
        offset,
    };
    let one = |row: Row| Writer::new().tensor("first", &[8], 0, &[0; 32]).row(row).bytes();
    let dims = |dims: &[u64], dtype: u32| one(row(b"w", dims, dtype, 32));
    let n_dims = |n_dims: u32| one(Row { n_dims, ..row(b"w", &[8], 0, 32) });
    let at = |offset: u64| one(row(b"w", &[8], 0, offset));
    let two = |dtype: u32| Writer::new().tensor("a", &[16], 0, &[0; 64]).row(row(b"b", &[4], dtype, 32)).bytes();
    let cut = |n: usize| {
        let mut bytes = small().bytes();
        bytes.truncate(bytes.len() - n);
        bytes
    };
    let blocks_at = small().bytes().len() - 3 * 144;
    let one_short =
        format!("tensor `blocks` needs 432 bytes at {blocks_at}; the file ends at {} (1 bytes short", blocks_at + 431);
    let gone =
        format!("tensor `blocks` needs 432 bytes at {blocks_at}; the file ends at {} (433 bytes short", blocks_at - 1);
    let long = "n".repeat(65);
    assert_errors(vec![
        ("name of 65", one(row(long.as_bytes(), &[8], 0, 32)), Invalid, &["the name of tensor 1", "65 bytes long"]),
        ("no name", one(row(b"", &[8], 0, 32)), Invalid, &["the name of tensor 1 at 61 is empty"]),
        ("name not UTF-8", one(row(b"\xc3", &[8], 0, 32)), Invalid, &["the name of tensor 1 at 61 is not UTF-8"]),
        ("twice", one(row(b"first", &[8], 0, 32)), Invalid, &["duplicate tensor `first` at byte 61"]),
        ("0 dims", n_dims(0), Invalid, &["tensor `w` has 0 dimensions"]),
        ("5 dims", n_dims(5), Invalid, &["tensor `w` has 5 dimensions", "1 to 4"]),
        ("2^32-1 dims", n_dims(u32::MAX), Invalid, &["4294967295 dimensions"]),
        ("3 dims too few", n_dims(4), Invalid, &["tensor `w` has a dimension of 0: [8, "]),
        ("a dim of 0", dims(&[8, 0], 0), Invalid, &["tensor `w` has a dimension of 0: [8, 0]"]),
        (
            "product 2^64",
            dims(&[1 << 32, 1 << 32], 0),
            Invalid,
            &["[4294967296, 4294967296]", "number of elements overflows"],
        ),
        ("product wraps to 8", dims(&[8, 1 << 61, 8, 1], 0), Invalid, &["number of elements overflows"]),
        ("product 2^63", dims(&[1 << 63], 0), Invalid, &["number of elements overflows"]),
        ("bytes 2^64", dims(&[1 << 62], 0), Invalid, &["number of bytes overflows"]),
        ("bytes 2^62", dims(&[1 << 60], 0), Invalid, &["tensor `w` needs 4611686018427387904 bytes", "4.61 EB short"]),
        (
            "row of 255, Q4_K",
            dims(&[255, 256], 12),
            Invalid,
            &["rows of 255 elements", "256, the block size of its type Q4_K"],
        ),
        ("row of 33, Q8_0", dims(&[33], 8), Invalid, &["rows of 33 elements", "32, the block size of its type Q8_0"]),
        ("row of 16, Q4_0", dims(&[16, 2], 2), Invalid, &["rows of 16 elements"]),
        ("offset 33", at(33), Invalid, &["tensor `w` has offset 33, which is not a multiple of the alignment 32"]),
        ("offset 2^64-32", at(u64::MAX - 31), Invalid, &["offset 18446744073709551584, which overflows"]),
        ("offset 2^63", at(1 << 63), Invalid, &["tensor `w` needs 32 bytes at 92233720368547", "9.22 EB short"]),
        (
            "offset past the end",
            at(64),
            Invalid,
            &["tensor `w` needs 32 bytes at", "64 bytes short: is the download incomplete?"],
        ),
        ("the same place", at(0), Invalid, &["tensor `w` (at 96) overlaps tensor `first` (ends at 128)"]),
        ("half on another", two(0), Invalid, &["tensor `b` (at 128) overlaps tensor `a` (ends at 160)"]),
        ("unknown on another", two(99), Invalid, &["tensor `b` (at 128) overlaps tensor `a`"]),
        ("unknown past the end", one(row(b"w", &[8], 99, 32)), Invalid, &["tensor `w` needs 1 bytes"]),
        ("cut by one byte", cut(1), Invalid, &[&one_short]),
        ("cut by a tensor", cut(433), Invalid, &[&gone]),
    ]);
}

#[test]
fn refuses_a_wrong_alignment() {
    let align = |kind: u32, value: &[u8]| {
        Writer::new().key("general.alignment", kind, value).tensor("w", &[8], 0, &[0; 32]).bytes()
    };
    let u32 = |value: u32| align(U32, &value.to_le_bytes());
    assert_errors(vec![
        ("0", u32(0), Invalid, &["key `general.alignment` is 0; it must be a power of two from 8 to 65536"]),
        ("1", u32(1), Invalid, &["is 1;"]),
        ("4", u32(4), Invalid, &["is 4;"]),
        ("48", u32(48), Invalid, &["is 48;"]),
        ("131072", u32(1 << 17), Invalid, &["is 131072;"]),
        ("2^31", u32(1 << 31), Invalid, &["is 2147483648;"]),
        ("2^32", align(U64, &(1u64 << 32).to_le_bytes()), Invalid, &["`general.alignment` is u64 4294967296"]),
        ("-32", align(I32, &(-32i32).to_le_bytes()), Invalid, &["`general.alignment` is i32 -32"]),
        ("text", align(STRING, &string("32")), Invalid, &["`general.alignment` is str \"32\""]),
        ("float", align(F32, &32f32.to_le_bytes()), Invalid, &["`general.alignment` is f32 32"]),
    ]);
}

#[test]
fn a_header_of_more_than_256_mib_is_refused() {
    let folder = folder();
    let writer = Writer::new().key("k", ARRAY, array(F64, 33 << 20, &[]));
    let path = writer.save(folder.path(), "m.gguf");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(300 << 20).unwrap(); // a hole: no disk is used
    let error = Gguf::open(&path, true).unwrap_err();
    assert_error("large", &path, &error, Invalid, &["key `k` at 49 makes the header larger than 256 MiB"]);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let folder = folder();
    let bytes = small().bytes();
    for end in 0..bytes.len() {
        let path = save(folder.path(), "cut.gguf", &bytes[..end]);
        let error = Gguf::open(&path, true).err().unwrap_or_else(|| panic!("opens when cut at {end}"));
        let part = if end == 0 { "empty" } else { "is the download incomplete?" };
        assert_error(&format!("cut at {end}"), &path, &error, Invalid, &[part]);
    }
}

#[test]
fn a_changed_byte_is_an_error_or_a_readable_file() {
    let folder = folder();
    let bytes = small().bytes();
    let header = small().header().len();
    let mut refused = 0;
    for at in 0..header {
        for change in [0x01, 0x80, 0xff, 0x20] {
            let mut bytes = bytes.clone();
            bytes[at] ^= change;
            let path = save(folder.path(), "m.gguf", &bytes);
            match Gguf::open(&path, true) {
                Ok(gguf) => damage::readable(&gguf),
                Err(error) => {
                    refused += 1;
                    let message = error.to_string();
                    assert!(message.starts_with(&path.display().to_string()) && !message.contains('\n'), "{message}");
                }
            }
        }
    }
    assert!(refused > header, "{refused} of {} changes were seen", 4 * header);
}

#[test]
fn names_what_is_there_instead_of_a_file() {
    let folder = folder();
    let root = folder.path();
    let missing = root.join("absent.gguf");
    assert_error("missing", &missing, &Gguf::open(&missing, true).unwrap_err(), NotFound, &["no such file"]);
    assert_error(
        "folder",
        root,
        &Gguf::open(root, true).unwrap_err(),
        NotFound,
        &["directory", "the directory has none"],
    );
    for name in ["b.gguf", "a.gguf", "notes.txt"] {
        save(root, name, b"");
    }
    let parts = ["directory; pass one of the GGUF files in it: a.gguf, b.gguf"];
    assert_error("models", root, &Gguf::open(root, true).unwrap_err(), NotFound, &parts);
    let below = root.join("a.gguf").join("b.gguf"); // a file is no directory
    let error = Gguf::open(&below, true).unwrap_err();
    assert!(matches!(error, Error::ModelNotFound(_) | Error::InvalidModel(_)), "{error:?}");
}

#[cfg(unix)]
#[test]
fn says_why_a_file_cannot_be_read() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder();
    let path = small().save(folder.path(), "m.gguf");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
    if std::fs::File::open(&path).is_err() {
        // not for root, who may read everything
        let error = Gguf::open(&path, true).unwrap_err();
        assert_error("no permission", &path, &error, Invalid, &["cannot be read", "denied"]);
    }
    let device = Path::new("/dev/null");
    assert_error("device", device, &Gguf::open(device, true).unwrap_err(), Invalid, &["not a regular file"]);
}

/// Part `number` (from 0) of `count`, with one tensor.
fn part(number: u16, count: u16, tensors: i32, tensor: &str) -> Writer {
    Writer::new()
        .key("split.no", U16, number.to_le_bytes())
        .key("split.count", U16, count.to_le_bytes())
        .key("split.tensors.count", I32, tensors.to_le_bytes())
        .tensor(tensor, &[8], 0, &[number as u8; 32])
}

#[test]
fn a_split_model_opens_from_its_first_part() {
    let folder = folder();
    let root = folder.path();
    let first = part(0, 3, 3, "a").str("general.name", "split").save(root, "m-q4-00001-of-00003.gguf");
    part(1, 3, 3, "b").save(root, "m-q4-00002-of-00003.gguf");
    part(2, 3, 3, "c").save(root, "m-q4-00003-of-00003.gguf");
    let gguf = Gguf::open(&first, true).unwrap();
    assert_eq!(gguf.tensors().map(|t| (&t.name[..], t.bytes()[0])).collect::<Vec<_>>(), [("a", 0), ("b", 1), ("c", 2)]);
    assert_eq!(gguf.tensor("c").unwrap().bytes(), [2; 32]);
    assert_eq!(gguf.metadata().str("general.name").unwrap(), Some("split"));
    assert_eq!(gguf.path(), first);
    assert_eq!(gguf.parts().len(), 3);
}

#[test]
fn a_part_that_says_nothing_is_known_by_its_name() {
    let folder = folder();
    let plain = |name: &str| Writer::new().tensor(name, &[8], 0, &[0; 32]);
    let first = plain("a").save(folder.path(), "m-00001-of-00002.gguf");
    plain("b").save(folder.path(), "m-00002-of-00002.gguf");
    assert_eq!(Gguf::open(&first, true).unwrap().tensors().len(), 2);

    // One part of one is no split, nor is a name that only looks like it.
    for name in ["x-00001-of-00001.gguf", "x-0001-of-0002.gguf", "x-00003-of-00002.gguf", "x-00000-of-00002.gguf"] {
        let path = plain("a").save(folder.path(), name);
        assert_eq!(Gguf::open(&path, true).unwrap().tensors().len(), 1, "{name}");
    }
}

#[test]
fn refuses_a_wrong_split() {
    let folder = folder();
    let root = folder.path();
    let write = |name: &str, one: Writer, two: Option<Writer>| {
        let first = one.save(root, &format!("{name}-00001-of-00002.gguf"));
        let second = root.join(format!("{name}-00002-of-00002.gguf"));
        if let Some(two) = two {
            two.save(root, &format!("{name}-00002-of-00002.gguf"));
        }
        (first, second)
    };
    let error = |path: &Path| Gguf::open(path, true).unwrap_err();

    let (_, second) = write("good", part(0, 2, 2, "a"), Some(part(1, 2, 2, "b")));
    let parts = ["this is part 2 of 2; open the first part", "good-00001-of-00002.gguf"];
    assert_error("second part", &second, &error(&second), Invalid, &parts);

    let (first, second) = write("missing", part(0, 2, 2, "a"), None);
    assert_error("missing part", &second, &error(&first), NotFound, &["no such file; it is part 2 of 2"]);

    let (first, second) = write("damaged", part(0, 2, 2, "a"), None);
    save(root, "damaged-00002-of-00002.gguf", b"<html>");
    assert_error("damaged part", &second, &error(&first), Invalid, &["HTML page"]);

    let (first, second) = write("number", part(0, 2, 2, "a"), Some(part(0, 2, 2, "b")));
    assert_error("number", &second, &error(&first), Invalid, &["key `split.no` is 0", "part 2 of 2"]);

    let (first, _) = write("count", part(0, 3, 2, "a"), Some(part(1, 2, 2, "b")));
    assert_error("count", &first, &error(&first), Invalid, &["key `split.count` is 3", "it should be 2"]);

    let (first, _) = write("tensors", part(0, 2, 3, "a"), Some(part(1, 2, 3, "b")));
    assert_error("tensors", &first, &error(&first), Invalid, &["`split.tensors.count` is 3", "2 parts hold 2 tensors"]);

    let (first, _) = write("twice", part(0, 2, 2, "a"), Some(part(1, 2, 2, "a")));
    assert_error("twice", &first, &error(&first), Invalid, &["tensor `a` is in two parts"]);

    let renamed = part(1, 3, 3, "b").save(root, "renamed.gguf");
    let parts = ["this is part 2 of 3", "does not end in -00001-of-00003.gguf"];
    assert_error("renamed", &renamed, &error(&renamed), Invalid, &parts);

    let single = part(0, 1, 1, "b").save(root, "single.gguf");
    assert_eq!(Gguf::open(&single, true).unwrap().tensors().len(), 1);
}
