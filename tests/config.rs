//! The keys of a file: the defaults of those that Microsoft's files leave out, the errors of wrong ones, and the memory
//! that follows from them.

mod gguf_writer;

use std::path::{Path, PathBuf};

use candle_phi::error::{Error, Result};
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::Config;
use candle_phi::model::requirements::estimate;
use gguf_writer::{F32, F64, STRING, U32, U64, Writer, string, strings};

/// A small model file whose keys and tensors a test can replace.
struct File {
    keys: Vec<(&'static str, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>)>,
}

fn u32(value: u32) -> (u32, Vec<u8>) {
    (U32, value.to_le_bytes().into())
}

fn f32(value: f32) -> (u32, Vec<u8>) {
    (F32, value.to_le_bytes().into())
}

fn str(value: &str) -> (u32, Vec<u8>) {
    (STRING, string(value))
}

fn tokens(n: usize) -> (u32, Vec<u8>) {
    (gguf_writer::ARRAY, strings(&vec!["a"; n]))
}

impl File {
    /// hidden 8, 4 heads of 2 features, 2 KV heads, feed-forward 6, 1 layer, 5 tokens, and only the required keys.
    fn new() -> Self {
        let file = File { keys: Vec::new(), tensors: Vec::new() };
        let file = file
            .key("general.architecture", str("phi3"))
            .key("phi3.context_length", u32(4096))
            .key("phi3.embedding_length", u32(8))
            .key("phi3.feed_forward_length", u32(6))
            .key("phi3.block_count", u32(1))
            .key("phi3.attention.head_count", u32(4))
            .key("phi3.attention.head_count_kv", u32(2))
            .key("tokenizer.ggml.model", str("llama"));
        [
            ("token_embd.weight", vec![8, 5]),
            ("blk.0.attn_norm.weight", vec![8]),
            ("blk.0.attn_qkv.weight", vec![8, 16]),
            ("blk.0.attn_output.weight", vec![8, 8]),
            ("blk.0.ffn_norm.weight", vec![8]),
            ("blk.0.ffn_up.weight", vec![8, 12]),
            ("blk.0.ffn_down.weight", vec![6, 8]),
            ("output_norm.weight", vec![8]),
            ("output.weight", vec![8, 5]),
        ]
        .into_iter()
        .fold(file, |file, (name, dims)| file.tensor(name, &dims))
    }

    fn without(mut self, name: &str) -> Self {
        self.keys.retain(|(key, ..)| *key != name);
        self.tensors.retain(|(tensor, _)| tensor != name);
        self
    }

    fn key(self, name: &'static str, (kind, value): (u32, Vec<u8>)) -> Self {
        let mut file = self.without(name);
        file.keys.push((name, kind, value));
        file
    }

    fn tensor(self, name: &str, dims: &[u64]) -> Self {
        let mut file = self.without(name);
        file.tensors.push((name.into(), dims.into()));
        file
    }

    fn save(self, folder: &Path) -> PathBuf {
        let writer = self.keys.iter().fold(Writer::new(), |writer, (name, kind, value)| writer.key(name, *kind, value));
        let writer = self.tensors.iter().fold(writer, |writer, (name, dims)| {
            let ones = vec![1f32.to_le_bytes(); dims.iter().product::<u64>() as usize].concat();
            writer.tensor(name, dims, 0, &ones)
        });
        writer.save(folder, "model.gguf")
    }

    fn config(self) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        Config::read(&Gguf::open(&self.save(folder.path()), true)?)
    }
}

#[test]
fn what_the_file_leaves_out_has_the_documented_default() {
    let config = File::new().config().unwrap();
    assert_eq!((config.rope_base, config.rope_dims, config.rms_eps), (10_000.0, 2, 1e-5));
    assert_eq!((config.long_rope, config.sliding_window, config.tied), (None, None, false));
    let config = File::new().without("phi3.attention.head_count_kv").tensor("blk.0.attn_qkv.weight", &[8, 24]).config();
    assert_eq!(config.unwrap().n_head_kv, 4, "as many as query heads");
    assert!(File::new().without("output.weight").config().unwrap().tied);
}

#[test]
fn the_4k_models_have_a_window_of_2047_that_their_files_do_not_state() {
    let spm_4k = || File::new().key("tokenizer.ggml.tokens", tokens(32064));
    let window = |file: File| file.config().unwrap().sliding_window;
    assert_eq!(window(spm_4k()), Some(2047));
    assert_eq!(window(spm_4k().key("phi3.attention.sliding_window", u32(0))), None, "0 is none");
    assert_eq!(window(spm_4k().key("phi3.attention.sliding_window", u32(9))), Some(9));
    assert_eq!(window(spm_4k().key("phi3.context_length", u32(8192))), None, "not a 4k model");
    assert_eq!(window(spm_4k().key("tokenizer.ggml.model", str("gpt2"))), None, "not SPM");
    assert_eq!(window(File::new().key("tokenizer.ggml.tokens", tokens(32063))), None, "another vocabulary");
}

#[test]
fn long_rope_comes_from_two_tensors_and_has_a_default_attention_factor() {
    let long = || {
        let file = File::new().key("phi3.context_length", u32(131_072));
        let file = file.key("phi3.rope.scaling.original_context_length", u32(4096));
        file.tensor("rope_factors_short.weight", &[1]).tensor("rope_factors_long.weight", &[1])
    };
    let rope = long().config().unwrap().long_rope.unwrap();
    assert_eq!((rope.original_context, rope.attn_factor), (4096, 1.190_238_1));
    let stated = long().key("phi3.rope.scaling.attn_factor", f32(1.5)).config().unwrap();
    assert_eq!(stated.long_rope.unwrap().attn_factor, 1.5);
}

#[test]
fn a_file_that_contradicts_itself_is_refused_with_the_key_and_the_number() {
    let cases: Vec<(File, &[&str])> = vec![
        (File::new().without("general.architecture"), &["general.architecture", "missing"]),
        (File::new().without("phi3.block_count"), &["phi3.block_count", "missing"]),
        (File::new().key("phi3.block_count", u32(0)), &["phi3.block_count", "0"]),
        (File::new().key("phi3.block_count", u32(2)), &["blk.1.attn_norm.weight"]),
        (File::new().key("phi3.block_count", str("1")), &["phi3.block_count"]),
        (File::new().key("phi3.embedding_length", u32(10)), &["phi3.embedding_length 10", "4"]),
        (File::new().key("phi3.attention.head_count_kv", u32(3)), &["head_count_kv", "3"]),
        (File::new().key("phi3.rope.dimension_count", u32(4)), &["dimension_count 4", "2"]),
        (File::new().key("phi3.rope.freq_base", f32(f32::NAN)), &["freq_base", "NaN"]),
        (File::new().key("phi3.attention.layer_norm_rms_epsilon", f32(-1.0)), &["epsilon", "-1"]),
        (File::new().without("blk.0.ffn_down.weight"), &["blk.0.ffn_down.weight"]),
        (File::new().tensor("blk.0.ffn_up.weight", &[8, 10]), &["blk.0.ffn_up.weight", "[10, 8]", "[12, 8]"]),
        (File::new().tensor("output.weight", &[8, 4]), &["output.weight", "[4, 8]", "[5, 8]"]),
        (File::new().tensor("token_embd.weight", &[40]), &["token_embd.weight", "[40]"]),
        (File::new().tensor("rope_factors_long.weight", &[1]), &["rope_factors_short.weight", "missing"]),
        (
            File::new().tensor("rope_factors_long.weight", &[3]).tensor("rope_factors_short.weight", &[1]),
            &["rope_factors_long.weight", "[3]", "[1]"],
        ),
    ];
    for (file, parts) in cases {
        let error = file.config().unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::InvalidModel(_)), "{message}");
        assert!(
            message.contains("model.gguf") && parts.iter().all(|part| message.contains(part)),
            "{message}: {parts:?}"
        );
    }
}

#[test]
fn every_number_out_of_its_range_is_refused_with_the_key_and_the_number() {
    let sizes = [
        "phi3.context_length",
        "phi3.embedding_length",
        "phi3.feed_forward_length",
        "phi3.block_count",
        "phi3.attention.head_count",
        "phi3.attention.head_count_kv",
        "phi3.rope.dimension_count",
    ];
    let mut cases = 0;
    let mut refused = |key: &'static str, value: (u32, Vec<u8>), number: String| {
        cases += 1;
        let error = File::new().key(key, value).config().expect_err(&format!("{key} = {number}"));
        let Error::InvalidModel(message) = &error else { panic!("{key} = {number}: {error:?}") };
        assert!(message.contains("model.gguf: ") && message.contains(key), "{key} = {number}: {message}");
        assert!(message.contains(&format!(" {number}")), "{key} = {number}: {message}");
    };
    let large = [1 << 32, 1 << 63, u64::MAX - 1, u64::MAX, (1 << 32) + 4, (1 << 63) + 4];
    let whole = |value: u64| (U64, value.to_le_bytes().to_vec());
    for value in [0, 1 << 29, 1 << 31, u64::from(u32::MAX)].into_iter().chain(large) {
        for key in sizes {
            refused(key, whole(value), value.to_string());
        }
    }
    for value in large {
        refused("phi3.attention.sliding_window", whole(value), value.to_string());
    }
    for value in [0.0, -0.0, -1e-30, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
        for key in ["phi3.rope.freq_base", "phi3.attention.layer_norm_rms_epsilon"] {
            refused(key, (F64, value.to_le_bytes().to_vec()), (value as f32).to_string());
        }
    }
    assert_eq!(cases, 90);
}

#[test]
fn sizes_beyond_any_model_are_refused_before_memory_is_taken_for_them() {
    let beyond = [
        ("phi3.block_count", 1 << 13),
        ("phi3.embedding_length", 1 << 17),
        ("phi3.feed_forward_length", 1 << 19),
        ("phi3.attention.head_count", 1 << 13),
    ];
    for (key, value) in beyond {
        let message = File::new().key(key, u32(value)).config().unwrap_err().to_string();
        assert!(message.contains(&format!("{key} is {value}; it must be from 1 to ")), "{message}");
    }
    let one_head = File::new().key("phi3.attention.head_count", u32(1)).key("phi3.attention.head_count_kv", u32(1));
    let message = one_head.key("phi3.embedding_length", u32(1 << 14)).config().unwrap_err().to_string();
    assert!(message.contains("heads of 16384 features; at most 8192"), "{message}");
}

#[test]
fn a_rope_context_of_one_token_is_refused_with_the_key_that_the_file_has() {
    let long = || {
        let file = File::new().tensor("rope_factors_short.weight", &[1]);
        file.tensor("rope_factors_long.weight", &[1])
    };
    let original = "phi3.rope.scaling.original_context_length";
    for (file, says) in [
        (long().key(original, u32(1)), "phi3.rope.scaling.original_context_length is 1; it must be from 2 to"),
        (long().key("phi3.context_length", u32(1)), "phi3.context_length is 1; LongRoPE must have at least 2"),
    ] {
        let error = file.config().unwrap_err();
        assert!(matches!(&error, Error::InvalidModel(message) if message.contains(says)), "{error}");
    }
    let rope = long().key(original, u32(2)).config().unwrap().long_rope.unwrap();
    assert!(rope.attn_factor.is_finite());
}

#[test]
fn the_memory_that_a_model_needs_follows_from_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = File::new().save(folder.path());
    let needed = |n_ctx, kv_cache| estimate(&path, n_ctx, kv_cache).unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    let of_100 = needed(Some(100), "f16");
    assert_eq!((of_100.weights, of_100.context), (size, 100 * 2 * 2 * 4), "2 KV heads of 2 features");
    assert_eq!(needed(Some(100), "f32").context, 2 * of_100.context);
    assert_eq!(needed(None, "f16").context, 4096 * 16);
    assert_eq!(needed(Some(1 << 20), "f16").context, 4096 * 16, "no more than the file's context");
    // 512 tokens at most are computed together.
    assert!(of_100.activations < needed(Some(512), "f16").activations);
    assert_eq!(needed(Some(512), "f16").activations, needed(Some(4096), "f16").activations);
    assert!(estimate(&path, None, "q4").is_err());
    let windowed = File::new().key("phi3.attention.sliding_window", u32(100)).save(folder.path());
    assert_eq!(estimate(&windowed, Some(4096), "f16").unwrap().context, (100 + 512) * 16);
}

#[test]
fn another_architecture_is_sound_but_not_ours() {
    let refused = |file: File, part: &str| match file.config() {
        Err(Error::UnsupportedModel(message)) => assert!(message.contains(part), "{message}"),
        other => panic!("{part}: {other:?}"),
    };
    refused(File::new().key("general.architecture", str("qwen3")), "qwen3");
    let old = File::new().key("general.architecture", str("llama")).key("general.name", str("LLaMA v2"));
    refused(old, "llama");
    let old = File::new().key("general.architecture", str("llama")).key("general.name", str("Phi3 mini"));
    refused(old, "old conversion");
    refused(File::new().key("phi3.rope.scaling.type", str("yarn")), "yarn");
    let head = File::new().key("phi3.attention.key_length", u32(64));
    refused(head, "phi3.attention.key_length is 64");
    refused(File::new().key("phi3.attention.value_length", u32(0)), "phi3.attention.value_length is 0");
    assert!(File::new().key("phi3.attention.key_length", u32(2)).config().is_ok());
}
