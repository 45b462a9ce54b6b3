//! The same operations, composed of Candle's own: for CUDA and Metal, and as an independent check on the CPU.

use std::ops::Range;

use candle_core::quantized::QMatMul;
use candle_core::{D, DType, Module, Result, Tensor};

use super::{AttentionShape, Matrix, Norm};
use crate::kv::cache::{KvLayer, Page};
use crate::model::rope::Angles;
use crate::system::{memory, panic};

pub fn embed(table: &Matrix, ids: &[u32]) -> Result<Tensor> {
    let table = table.candle()?;
    table.embedding(&Tensor::new(ids, &table.device())?)
}

pub fn linear(x: &Tensor, weights: &Matrix) -> Result<Tensor> {
    QMatMul::from_arc(weights.candle()?.clone())?.forward(&x.contiguous()?)
}

pub fn rms_norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    candle_nn::ops::rms_norm(&x.contiguous()?, &norm.weight, norm.eps)
}

pub fn rope(qkv: &Tensor, angles: &Angles, shape: AttentionShape) -> Result<Tensor> {
    let (tokens, rotated, head_dim) = (qkv.dim(0)?, 2 * angles.half, shape.head_dim);
    let table = |values: &[f32]| Tensor::from_slice(values, (tokens, angles.half), qkv.device());
    let turned = shape.q_dim() + shape.kv_dim();
    let heads = qkv.narrow(1, 0, turned)?.reshape((1, tokens, turned / head_dim, head_dim))?.transpose(1, 2)?;
    let first = heads.narrow(D::Minus1, 0, rotated)?.contiguous()?; // (1, heads, tokens, rotated)
    let first = candle_nn::rotary_emb::rope(&first, &table(&angles.cos)?, &table(&angles.sin)?)?;
    let heads = match head_dim - rotated {
        0 => first,
        rest => Tensor::cat(&[&first, &heads.narrow(D::Minus1, rotated, rest)?.contiguous()?], D::Minus1)?,
    };
    let heads = heads.transpose(1, 2)?.reshape((tokens, turned))?;
    Tensor::cat(&[&heads, &qkv.narrow(1, turned, shape.kv_dim())?], 1)
}

/// Writes the keys and values of some rows of qkv into a page, from position `at` of the page on.
pub fn append(qkv: &Tensor, rows: Range<usize>, shape: AttentionShape, page: &Page, at: usize) -> Result<()> {
    let AttentionShape { n_head_kv, head_dim, .. } = shape;
    let k = shape.q_dim();
    for (from, page) in [(k, page.k.tensor()?), (k + shape.kv_dim(), page.v.tensor()?)] {
        let heads = qkv.narrow(0, rows.start, rows.len())?.narrow(1, from, shape.kv_dim())?;
        let heads = heads.reshape((rows.len(), n_head_kv, head_dim))?.transpose(0, 1)?;
        page.slice_set(&heads.to_dtype(page.dtype())?.contiguous()?, 1, at)?;
    }
    Ok(())
}

pub fn attention(qkv: &Tensor, layer: &KvLayer, shape: AttentionShape) -> Result<Tensor> {
    let AttentionShape { n_head, n_head_kv, head_dim, window } = shape;
    let (tokens, group) = (qkv.dim(0)?, n_head / n_head_kv);
    let q = qkv.narrow(1, 0, shape.q_dim())?;
    let all = |part: fn(&Page) -> Result<&Tensor>| -> Result<Tensor> {
        let pages: Vec<&Tensor> = layer.iter().map(part).collect::<Result<_>>()?;
        let held = layer.len() - layer.start();
        Tensor::cat(&pages, 1)?.narrow(1, 0, held)?.to_dtype(DType::F32)?.contiguous() // (n_head_kv, held, head_dim)
    };
    let (k, v) = (all(|page| page.k.tensor())?, all(|page| page.v.tensor())?);
    // (n_head_kv, group * tokens, head_dim): the query heads of one KV head, one after the other
    let q = q.reshape((tokens, n_head, head_dim))?.transpose(0, 1)?.contiguous()?;
    let q = q.reshape((n_head_kv, group * tokens, head_dim))?;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (head_dim as f64).sqrt())?;
    let (rows, keys) = (group * tokens, layer.len() - layer.start());
    let mut mask = Vec::new();
    let what = format_args!("an attention mask of {rows} queries and {keys} keys");
    memory::reserve(&mut mask, rows * keys, what).unwrap_or_else(|error| panic::resume(error));
    mask.extend((0..rows).flat_map(|row| {
        let position = layer.len() - tokens + row % tokens;
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        (layer.start()..layer.len())
            .map(move |key| if (first..=position).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
    }));
    let mask = Tensor::from_vec(mask, (1, rows, keys), q.device())?;
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
    let out = weights.matmul(&v)?.reshape((n_head, tokens, head_dim))?;
    out.transpose(0, 1)?.reshape((tokens, n_head * head_dim))
}

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let features = x.dim(1)? / 2;
    x.narrow(1, 0, features)?.silu()? * x.narrow(1, features, features)?
}
