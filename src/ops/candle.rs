//! The same operations composed of Candle's own: for CUDA and Metal, and as an independent check on the CPU.

use candle_core::quantized::QMatMul;
use candle_core::{D, DType, Module, Result, Tensor};

use super::{AttentionShape, Matrix};
use crate::cache::KvLayer;

pub fn embed(table: &Matrix, ids: &[u32]) -> Result<Tensor> {
    let table = table.candle()?;
    table.embedding(&Tensor::new(ids, &table.device())?)
}

pub fn linear(x: &Tensor, weights: &Matrix) -> Result<Tensor> {
    QMatMul::from_arc(weights.candle()?.clone())?.forward(&x.contiguous()?)
}

pub fn rope(x: &Tensor, head_dim: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, features) = x.dims2()?;
    let rotated = 2 * cos.dim(1)?;
    let heads = x.reshape((1, tokens, features / head_dim, head_dim))?.transpose(1, 2)?; // (1, heads, tokens, head_dim)
    let turned = candle_nn::rotary_emb::rope(&heads.narrow(D::Minus1, 0, rotated)?.contiguous()?, cos, sin)?;
    let heads = match head_dim - rotated {
        0 => turned,
        rest => Tensor::cat(&[&turned, &heads.narrow(D::Minus1, rotated, rest)?.contiguous()?], D::Minus1)?,
    };
    heads.transpose(1, 2)?.reshape((tokens, features))
}

/// Writes rows (tokens, heads * head_dim) into a page (heads, PAGE, head_dim) from position `at` of the page.
pub fn store(page: &Tensor, rows: &Tensor, at: usize) -> Result<()> {
    let (heads, _, head_dim) = page.dims3()?;
    let rows = rows.reshape((rows.dim(0)?, heads, head_dim))?.transpose(0, 1)?;
    page.slice_set(&rows.to_dtype(page.dtype())?.contiguous()?, 1, at)
}

pub fn attention(q: &Tensor, layer: &KvLayer, shape: AttentionShape) -> Result<Tensor> {
    let AttentionShape { n_head, n_head_kv, head_dim, window } = shape;
    let (tokens, group) = (q.dim(0)?, n_head / n_head_kv);
    let all = |part: fn(&crate::cache::Page) -> &Tensor| -> Result<Tensor> {
        let pages: Vec<&Tensor> = layer.iter().map(part).collect();
        let held = layer.len() - layer.start();
        Tensor::cat(&pages, 1)?.narrow(1, 0, held)?.to_dtype(DType::F32)?.contiguous() // (n_head_kv, held, head_dim)
    };
    let (k, v) = (all(|page| &page.k)?, all(|page| &page.v)?);
    // (n_head_kv, group * tokens, head_dim): the query heads of one KV head, one after the other
    let q = q.reshape((tokens, n_head, head_dim))?.transpose(0, 1)?.contiguous()?;
    let q = q.reshape((n_head_kv, group * tokens, head_dim))?;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (head_dim as f64).sqrt())?;
    let mask: Vec<f32> = (0..group * tokens)
        .flat_map(|row| {
            let position = layer.len() - tokens + row % tokens;
            let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
            (layer.start()..layer.len())
                .map(move |key| if (first..=position).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (1, group * tokens, layer.len() - layer.start()), q.device())?;
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
    let out = weights.matmul(&v)?.reshape((n_head, tokens, head_dim))?;
    out.transpose(0, 1)?.reshape((tokens, n_head * head_dim))
}

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let features = x.dim(1)? / 2;
    x.narrow(1, 0, features)?.silu()? * x.narrow(1, features, features)?
}
