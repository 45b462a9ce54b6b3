//! Any bytes as a model file: opened, and if that works read, tokenized with, and computed with, over a prompt of several
//! hundred tokens. libFuzzer's memory limit counts: a small file must not need a large buffer.
//!
//! Decisions: docs/design/files.md
#![no_main]
mod scratch;

use std::sync::{Arc, LazyLock};

use candle_phi::compute::kernels;
use candle_phi::compute::ops::{Backend, KvType};
use candle_phi::compute::pool::Pool;
use candle_phi::error::Result;
use candle_phi::files::gguf::{Gguf, Value};
use candle_phi::model::phi3::Phi3;
use candle_phi::model::{self, Model, Phase, Want};
use candle_phi::system::sync::Cancel;
use candle_phi::text::chat::{Message, Template};
use candle_phi::text::tokenizer::{Special, Tokenizer};
use libfuzzer_sys::fuzz_target;
use scratch::{Scratch, check_message};

const PROMPT: usize = 600;

static FILE: LazyLock<Scratch> = LazyLock::new(|| Scratch::new("model.gguf"));

fn run(bytes: &[u8]) -> Result<()> {
    FILE.write(bytes);
    let gguf = Gguf::open(&FILE.path, true)?;
    for (_, value) in gguf.metadata().iter() {
        if let Value::Array(array) = value {
            assert_eq!(array.iter().count(), array.len());
        }
        assert!(value.to_string().len() < 1000);
    }
    for tensor in gguf.tensors() {
        assert!(tensor.bytes().iter().map(|&byte| u64::from(byte)).sum::<u64>() <= 255 * bytes.len() as u64);
    }

    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf)?);
    let ids = tokenizer.encode("<|user|> hello\n\0 中😀</s>", Special::All)?;
    tokenizer.decode(&ids, true)?;
    let template = Template::new(None, &gguf, tokenizer.clone())?;
    let messages = ["system", "user"].map(|role| Message { role: role.into(), content: "a<|end|>".into() });
    if let Err(error) = template.render(&messages) {
        check_message(&error);
    }

    let kernel = kernels::by_name("portable").expect("it runs everywhere");
    let model = Phi3::load(&gguf, Backend::Cpu { kernel, pool: Pool::new(1) }, KvType::F16)?;
    let n_vocab = model.info().n_vocab;
    // Longer than a chunk of a prompt, so that buffers have the size that they grow to.
    let length = model.info().context_length.min(PROMPT + 1).saturating_sub(1).max(1);
    let ids: Vec<u32> = (0..length).rev().map(|i| (i % n_vocab) as u32).collect();
    model.check_length(length + 1)?;
    let mut batch = model::single(&model, &Cancel::default())?;
    assert_eq!(model::compute(&model, &mut batch, &ids, Phase::Prefill, Want::Last)?.len(), n_vocab);
    model::compute(&model, &mut batch, &ids[..1], Phase::Decode, Want::Last)?;
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = run(bytes) {
        check_message(&error);
    }
});
