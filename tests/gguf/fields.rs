//! Every count, length, type, dimension and offset of a file in turn with every number that overflows something:
//! 0, 1, the largest and the one before, 2^31, 2^32, 2^63, and what wraps around to a small number where it is added to
//! or multiplied.
use super::*;

/// Where a number stands, and how many bytes it has.
struct Field {
    name: &'static str,
    at: usize,
    width: usize,
    /// What makes a sum or product with it wrap: 2^64 - 24 is before the file's start, 2^61 times 8 is 0.
    wraps: u64,
}

/// One of each kind of field.
fn file() -> (Vec<u8>, Vec<Field>) {
    let writer = Writer::new()
        .str("word", "phi3")
        .u32("number", 7)
        .key("list", ARRAY, strings(&["ab", "c"]))
        .key("reals", ARRAY, array(F32, 2, &[0; 8]))
        .tensor("a", &[8, 2], 0, &[1; 64])
        .tensor("b", &[32, 1], 8, &[2; 34]);
    let bytes = writer.bytes();
    let find = |text: &str| bytes.windows(text.len()).position(|window| window == text.as_bytes()).expect(text);
    let (word, number, list, reals) = (find("word"), find("number"), find("list"), find("reals"));
    // A tensor's name is one letter, after its length; the first place of "a" may be in another word.
    let b = bytes.windows(9).position(|window| window == b"\x01\0\0\0\0\0\0\0b").expect("tensor b") + 8;
    let below_0 = 24u64.wrapping_neg();
    let field = |name, at, width, wraps| Field { name, at, width, wraps };
    let fields = vec![
        field("version", 4, 4, 1 << 24),
        field("number of tensors", 8, 8, (1 << 63) + 1),
        field("number of keys", 16, 8, (1 << 62) + 1),
        field("length of a key's name", word - 8, 8, below_0),
        field("type of a key", number + 6, 4, 1 << 16),
        field("length of a string", word + 8, 8, below_0),
        field("element type", list + 8, 4, 1 << 16),
        field("number of strings", list + 12, 8, (1 << 61) + 2),
        field("length of an element", list + 20, 8, below_0),
        field("number of floats", reals + 13, 8, (1 << 62) + 2),
        field("length of a tensor's name", b - 8, 8, below_0),
        field("number of dimensions", b + 1, 4, 1 << 30),
        field("row length", b + 5, 8, 1 << 59),
        field("rows", b + 13, 8, 1 << 59),
        field("type of a tensor", b + 21, 4, 1 << 16),
        field("offset", b + 25, 8, below_0),
    ];
    (bytes, fields)
}

/// `fields.txt` has a line for each: what the field is called and set to, and the error, word for word.
#[test]
fn every_field_with_every_number() {
    let (bytes, fields) = file();
    let folder = folder();
    let mut lines = include_str!("fields.txt").lines();
    for field in fields {
        let largest = if field.width == 8 { u64::MAX } else { u32::MAX.into() };
        let values = [0, 1, largest, largest - 1, 1 << 31, 1 << 32, 1 << 63, field.wraps];
        for value in values.into_iter().filter(|&value| value <= largest) {
            let mut changed = bytes.clone();
            changed[field.at..][..field.width].copy_from_slice(&value.to_le_bytes()[..field.width]);
            let path = save(folder.path(), "m.gguf", &changed);
            let result = match Gguf::open(&path, true) {
                Ok(_) => "opens".to_owned(),
                Err(Error::InvalidModel(message)) => format!("invalid: {message}"),
                Err(Error::UnsupportedModel(message)) => format!("unsupported: {message}"),
                Err(error) => panic!("{} = {value}: {error:?}", field.name),
            };
            let result = result.replace(&format!("{}: ", path.display()), "");
            let line = format!("{} = {value}: {result}", field.name);
            println!("{line}");
            assert_eq!(Some(&line[..]), lines.next());
        }
    }
    assert_eq!(lines.next(), None);
}
