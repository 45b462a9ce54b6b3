//! A complete model of some kilobytes, for tests that damage it.
use super::*;

/// One layer of 32 features and one head, an SPM vocabulary of the 256 bytes and a few pieces, weights that are noise.
pub fn small_model() -> Writer {
    model(32, 256)
}

/// The same with a feed-forward layer as wide as fits into 64 KiB, for prompts of several hundred tokens.
pub fn wide_model() -> Writer {
    model(384, 1024)
}

fn model(feed_forward: u64, context: u32) -> Writer {
    const HIDDEN: u64 = 32;
    let (tokens, types) = vocabulary();
    let scores: Vec<u8> = (0..tokens.len()).flat_map(|id| (-(id as f32)).to_le_bytes()).collect();
    let n = tokens.len() as u64;
    let mut noise = Noise(1);
    let mut writer = Writer::new()
        .str("general.architecture", "phi3")
        .u32("phi3.block_count", 1)
        .u32("phi3.embedding_length", HIDDEN as u32)
        .u32("phi3.feed_forward_length", feed_forward as u32)
        .u32("phi3.attention.head_count", 1)
        .u32("phi3.context_length", context)
        .u32("phi3.attention.sliding_window", 64)
        .str("tokenizer.ggml.model", "llama")
        .key("tokenizer.ggml.tokens", ARRAY, strings(&tokens))
        .key("tokenizer.ggml.scores", ARRAY, array(F32, n, &scores))
        .key("tokenizer.ggml.token_type", ARRAY, array(I32, n, &types.concat()))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0)
        .str(
            "tokenizer.chat_template",
            "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
        );
    for (name, dims) in [
        ("token_embd.weight", &[HIDDEN, n][..]),
        ("blk.0.attn_norm.weight", &[HIDDEN]),
        ("blk.0.attn_qkv.weight", &[HIDDEN, 3 * HIDDEN]),
        ("blk.0.attn_output.weight", &[HIDDEN, HIDDEN]),
        ("blk.0.ffn_norm.weight", &[HIDDEN]),
        ("blk.0.ffn_up.weight", &[HIDDEN, 2 * feed_forward]),
        ("blk.0.ffn_down.weight", &[feed_forward, HIDDEN]),
        ("output_norm.weight", &[HIDDEN]),
    ] {
        let elements = dims.iter().product::<u64>() as usize;
        writer = match dims {
            [_] => writer.tensor(name, dims, 0, &1f32.to_le_bytes().repeat(elements)),
            _ => writer.tensor(name, dims, 8, &noise.q8_0(elements)),
        };
    }
    writer
}

/// The sizes of a model of one layer.
#[derive(Copy, Clone)]
pub struct Shape {
    pub hidden: u64,
    pub feed_forward: u64,
    pub n_head: u64,
    pub n_head_kv: u64,
    pub n_vocab: u64,
    pub context: u32,
}

/// A model of these sizes without a tokenizer: F16 weights of noise, and the embedding table as its head.
pub fn model_of(shape: Shape) -> Writer {
    let Shape { hidden, feed_forward, n_head, n_head_kv, n_vocab, context } = shape;
    let writer = Writer::new()
        .str("general.architecture", "phi3")
        .u32("phi3.block_count", 1)
        .u32("phi3.embedding_length", hidden as u32)
        .u32("phi3.feed_forward_length", feed_forward as u32)
        .u32("phi3.attention.head_count", n_head as u32)
        .u32("phi3.attention.head_count_kv", n_head_kv as u32)
        .u32("phi3.context_length", context);
    let writer = ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"]
        .into_iter()
        .fold(writer, |writer, name| writer.tensor(name, &[hidden], 0, &1f32.to_le_bytes().repeat(hidden as usize)));
    let kv = hidden / n_head * n_head_kv;
    let mut noise = Noise(1);
    [
        ("token_embd.weight", hidden, n_vocab),
        ("blk.0.attn_qkv.weight", hidden, hidden + 2 * kv),
        ("blk.0.attn_output.weight", hidden, hidden),
        ("blk.0.ffn_up.weight", hidden, 2 * feed_forward),
        ("blk.0.ffn_down.weight", feed_forward, hidden),
    ]
    .into_iter()
    .fold(writer, |writer, (name, cols, rows)| writer.tensor(name, &[cols, rows], 1, &noise.f16(cols * rows)))
}

/// Texts and types.
fn vocabulary() -> (Vec<String>, Vec<[u8; 4]>) {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello"].map(String::from);
    let control = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"].map(String::from);
    let tokens: Vec<String> =
        ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes).chain(pieces).chain(control).collect();
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..=258 => 6,
        259..=268 => 1,
        _ => 3i32,
    };
    let types = (0..tokens.len()).map(|id| kind(id).to_le_bytes()).collect();
    (tokens, types)
}

/// Numbers without a pattern (xorshift).
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Magnitudes from 1/4 to 1.
    fn f16(&mut self, elements: u64) -> Vec<u8> {
        (0..elements).flat_map(|_| (self.next() as u16 & 0x87ff | 0x3400).to_le_bytes()).collect()
    }

    /// Blocks of 32 elements: a scale of 2^-9 in f16, then as many bytes.
    fn q8_0(&mut self, elements: usize) -> Vec<u8> {
        let block = |_| [0x00, 0x18].into_iter().chain((0..32).map(|_| self.next() as u8)).collect::<Vec<u8>>();
        (0..elements / 32).flat_map(block).collect()
    }
}
