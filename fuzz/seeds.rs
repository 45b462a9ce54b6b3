//! Writes the seeds of each target: `seeds FOLDER` makes FOLDER/gguf, hub, kv_file, listing, template, text and tokenizer.

#[path = "../tests/attacks/mod.rs"]
mod attacks;
#[path = "../tests/gguf_writer/mod.rs"]
mod gguf_writer;
#[path = "../tests/kv_columns/mod.rs"]
mod kv_columns;
#[path = "../tests/random/mod.rs"]
mod random;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_phi::compute::ops::KvType;
use candle_phi::kv::file::{self, Contents};
use candle_phi::system::task::Task;
use gguf_writer::save;

fn main() {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("seeds FOLDER"));
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = folder.join(target);
        std::fs::create_dir_all(&folder).expect("a writable folder");
        save(&folder, name, bytes);
    };

    write("gguf", "small.gguf", &gguf_writer::model::small_model().bytes());
    write("gguf", "wide.gguf", &gguf_writer::model::wide_model().bytes());
    write("gguf", "types.gguf", &every_type().bytes());
    for name in ["q4_0.gguf", "q4_1.gguf", "q5_0.gguf", "q5_1.gguf"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        write("gguf", name, &std::fs::read(golden).expect("a file of this repository"));
    }

    // Without those that count to 100000: under the sanitizer they take seconds, and so do their mutations.
    let quick = |source: &String| source.len() < 4096 && !source.contains("100000");
    for (i, (_, source)) in attacks::attacks().iter().enumerate().filter(|(_, (_, source))| quick(source)) {
        write("template", &format!("attack-{i}"), source.as_bytes());
    }
    for (i, source) in TEMPLATES.iter().enumerate() {
        write("template", &format!("usual-{i}"), source.as_bytes());
    }

    let stops: [(&str, &[u8]); 4] = [
        ("ab\n", b"xxabab"),
        ("\u{1f3d2}\nc", "go \u{1f3d2}\u{1f945}".as_bytes()),
        ("", b"\xf0\x9f\xff\xe2\x96"),
        ("aab\nab", b"aaab\xf1\xf2\xf3"),
    ];
    for (i, (stops, ids)) in stops.iter().enumerate() {
        write("text", &format!("stop-{i}"), &[stops.as_bytes(), b"\n\n", ids].concat());
    }

    for (i, text) in HUB.iter().enumerate() {
        write("hub", &format!("{i}"), text.as_bytes());
    }
    for (i, bytes) in chats().iter().enumerate() {
        write("kv_file", &format!("{i}.safetensors"), bytes);
    }
    for (i, json) in LISTINGS.iter().enumerate() {
        write("listing", &format!("{i}.json"), json.as_bytes());
    }

    for (i, json) in TOKENIZERS.iter().enumerate() {
        write("tokenizer", &format!("{i}.json"), json.as_bytes());
    }
}

/// Files of keys and values of every type: of the first columns and of later ones, and without any.
fn chats() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("chat");
    let cases = [(KvType::F16, 0, 5), (KvType::F32, 0, 130), (KvType::Q8_0, 2, 300), (KvType::F16, 0, 1)];
    let shapes = [(1, 1, 2), (2, 1, 2), (1, 2, 40), (1, 1, 2)];
    let files = cases.into_iter().zip(shapes).map(|((kv_type, first, ids), (layers, heads, head_dim))| {
        let shape = kv_columns::shape(kv_type, layers, heads, head_dim);
        let computed = ids as usize - 1;
        let contents = Contents {
            fingerprint: "model",
            start: 0,
            ids: &(0..ids).collect::<Vec<u32>>(),
            runs: &[computed / 2, computed - computed / 2],
            columns: &kv_columns::columns(&shape, first, computed, 1),
            computed,
            metadata: &BTreeMap::from([("messages".into(), "[]".into())]),
        };
        file::write(&path, &contents, &Task::default()).expect("a writable folder");
        std::fs::read(&path).expect("our own file")
    });
    files.collect()
}

/// A key of every type and a tensor, without a model around them.
fn every_type() -> gguf_writer::Writer {
    use gguf_writer::*;
    Writer::new()
        .key("a", U8, [1])
        .key("b", I8, [1])
        .key("c", U16, [1, 0])
        .key("d", I16, [1, 0])
        .u32("general.alignment", 64)
        .key("e", I32, [1, 0, 0, 0])
        .key("f", U64, [1; 8])
        .key("g", I64, [1; 8])
        .key("h", F32, [1; 4])
        .key("i", F64, [1; 8])
        .key("j", BOOL, [1])
        .str("k", "text")
        .key("l", ARRAY, strings(&["a", "", "b"]))
        .key("m", ARRAY, array(F64, 1, &[0; 8]))
        .tensor("w", &[256, 1, 1, 1], 12, &[0; 144])
}

const TEMPLATES: [&str; 6] = [
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}\
     {% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.role != 'system' -%}{%- set ns.n = ns.n + 1 -%}\
     {{ loop.index }}{{ m.content | trim | tojson }}{%- endfor -%}{{ ns.n }}",
    "{% macro turn(m, last=false) %}<|{{ m.role }}|>{{ m.content.split('\n')[-1].strip() }}{% if not last %}<|end|>{% endif %}\
     {% endmacro %}{% for m in messages %}{{ turn(m, last=loop.last) }}{% endfor %}",
    "<{{ messages[0].content }}|>{{ '<' ~ messages[-1].content[1:] ~ '>' }}{% for c in messages[0].content %}<|{{ c }}|>\
     {% endfor %}{{ [messages[0].content, messages[0].content.split('|')] | tojson }}",
    "r<|{{ messages[0].role }}|>{% set x %}<{{ messages[0].role }}{% endset %}{{ x }}{{ x.replace('<', '{') ~ '}' }}\
     {{ messages | map(attribute='content') | join('<') | reverse | indent(1) }}{{ messages[1].content.upper().title() }}",
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}\
     {% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role not in ['user', 'assistant'] %}\
     {{ raise_exception('no ' ~ m.role) }}{% endif %}{{ m.content | replace('a', 'b') | upper }}{% endfor %}",
];

const HUB: [&str; 6] = [
    "*q[0-9]?.gguf\nphi-q4x.gguf",
    "bytes 5-9/10\n/x?from=https://y",
    "bytes 0-0/*\n//host/a/./../b#c",
    "W/\"0123456789012345678901234567890123456789\"\n?q",
    "a/b-00002-of-00003.gguf\nmailto:x",
    "org/model\n../../g;x=1/../y",
];

const LISTINGS: [&str; 2] = [
    r#"{"sha":"0123456789012345678901234567890123456789","siblings":[{"rfilename":"a.gguf","size":5,"lfs":{"sha256":"0123456789012345678901234567890123456789012345678901234567890123","size":5}},{"rfilename":"README.md","blobId":"0123456789012345678901234567890123456789"}]}"#,
    r#"{"sha":"0123456789012345678901234567890123456789","siblings":[{"rfilename":"a-00001-of-00003.gguf"},{"rfilename":"a-00002-of-00003.gguf"},{"rfilename":"a-00003-of-00003.gguf"},{"rfilename":"b/c-00001-of-99999.gguf"}]}"#,
];

const TOKENIZERS: [&str; 3] = [
    r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},{"id":20,"content":"<|user|>","single_word":false,"lstrip":false,"rstrip":true,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,"post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":false,"vocab":{"<unk>":0,"▁":1,"h":2,"e":3,"l":4,"o":5,"he":6,"ll":7,"hell":8,"<0x0A>":9},"merges":["h e",["l","l"],"he ll"]}}"#,
    r#"{"added_tokens":[{"id":5,"content":"<|im_start|>","single_word":true,"lstrip":true,"rstrip":true,"normalized":true,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","unk_token":null,"ignore_merges":true,"vocab":{"a":0,"b":1,"ab":2,"Ġ":3,"Ġa":4},"merges":["a b","Ġ a"]}}"#,
    r#"{"normalizer":{"type":"Sequence","normalizers":[{"type":"Strip","strip_left":true,"strip_right":true},{"type":"StripAccents"},{"type":"Lowercase"},{"type":"NFKD"},{"type":"Replace","pattern":{"Regex":"l+"},"content":"l"}]},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":true},{"type":"Digits","individual_digits":true},{"type":"Punctuation","behavior":"MergedWithPrevious"},{"type":"FixedLength","length":5},{"type":"WhitespaceSplit"},{"type":"CharDelimiterSplit","delimiter":"l"},{"type":"UnicodeScripts"},{"type":"BertPreTokenizer"}]},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"l":0},"merges":[]}}"#,
];
