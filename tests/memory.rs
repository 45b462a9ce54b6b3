//! The weights stay in the mapped file. A binary of its own: it measures the whole process.
#![cfg(target_os = "linux")]

mod gguf_writer;

use candle_phi::compute::kernels;
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::files::gguf::Gguf;
use candle_phi::model::phi3::Phi3;
use candle_phi::model::{self, Phase, Want};
use candle_phi::system::sync::Cancel;
use gguf_writer::Writer;

const HIDDEN: u64 = 1024;
const VOCABULARY: u64 = 1 << 15;
const F16: u32 = 1;

/// Private memory that this process has written, in MB.
fn private_dirty() -> u64 {
    let report = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = report.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn a_model_costs_no_second_copy_of_its_weights_and_no_cache_before_it_is_used() {
    let half = |n: u64| [0x00, 0x20].repeat(n as usize); // 2^-7
    let ones = |n: u64| 1f32.to_le_bytes().repeat(n as usize);
    let matrix = |w: Writer, name: &str, cols, rows| w.tensor(name, &[cols, rows], F16, &half(cols * rows));
    let writer = Writer::new()
        .str("general.architecture", "phi3")
        .u32("phi3.context_length", 131_072) // its whole cache would be 537 MB
        .u32("phi3.embedding_length", HIDDEN as u32)
        .u32("phi3.feed_forward_length", HIDDEN as u32)
        .u32("phi3.block_count", 1)
        .u32("phi3.attention.head_count", 8)
        .tensor("blk.0.attn_norm.weight", &[HIDDEN], 0, &ones(HIDDEN))
        .tensor("blk.0.ffn_norm.weight", &[HIDDEN], 0, &ones(HIDDEN))
        .tensor("output_norm.weight", &[HIDDEN], 0, &ones(HIDDEN));
    let writer = matrix(writer, "token_embd.weight", HIDDEN, VOCABULARY); // 67 MB, and tied: the head too
    let writer = matrix(writer, "blk.0.attn_qkv.weight", HIDDEN, 3 * HIDDEN);
    let writer = matrix(writer, "blk.0.attn_output.weight", HIDDEN, HIDDEN);
    let writer = matrix(writer, "blk.0.ffn_up.weight", HIDDEN, 2 * HIDDEN);
    let writer = matrix(writer, "blk.0.ffn_down.weight", HIDDEN, HIDDEN);
    let folder = tempfile::tempdir().unwrap();
    let path = writer.save(folder.path(), "model.gguf");
    drop(writer);
    std::fs::File::open(&path).unwrap().sync_all().unwrap(); // pages not yet on the disk would count as dirty

    let before = private_dirty();
    let backend = Backend::Cpu { kernel: kernels::by_name("portable").unwrap(), pool: Pool::new(2) };
    let model = Phi3::load(&Gguf::open(&path, true).unwrap(), backend, KvType::F16).unwrap();
    let mut batch = model::single(&model, &Cancel::default()).unwrap();
    let logits = model::compute(&model, &mut batch, &[1, 2, 3], Phase::Prefill, Want::Last).unwrap();
    assert!(logits.iter().all(|logit| logit.is_finite()));
    let grown = private_dirty().saturating_sub(before);
    assert!(grown < 20, "{grown} MB more of private memory; the weights are 81 MB");
}
