//! The same operations, composed of Candle's own: for CUDA and Metal, and as an independent check on the CPU.

use candle_core::quantized::QMatMul;
use candle_core::{D, DType, Device, Module, Result, Tensor};

use super::{Angles, AttentionShape, Column, KvBlock, Matrix, Norm, Piece, Segment};
use crate::compute::kernels::PAGE;
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

/// Writes the keys and values of the rows to a block.
pub fn append(qkv: &Tensor, shape: AttentionShape, piece: Piece<'_>) -> Result<()> {
    let AttentionShape { n_head_kv, head_dim, .. } = shape;
    let Piece { rows, at, block } = piece;
    let k = shape.q_dim();
    for (from, tensor) in [(k, block.k.tensor()?), (k + shape.kv_dim(), block.v.tensor()?)] {
        let heads = qkv.narrow(0, rows.start, rows.len())?.narrow(1, from, shape.kv_dim())?;
        let heads = heads.reshape((rows.len(), n_head_kv, head_dim))?.transpose(0, 1)?;
        tensor.slice_set(&heads.to_dtype(tensor.dtype())?.contiguous()?, 1, at)?;
    }
    Ok(())
}

/// The rows of each segment over its own columns.
pub fn attention(qkv: &Tensor, shape: AttentionShape, layer: usize, segments: &[Segment<'_>]) -> Result<Tensor> {
    let parts: Vec<Tensor> =
        segments.iter().map(|segment| attention_of(qkv, shape, layer, segment)).collect::<Result<_>>()?;
    Tensor::cat(&parts, 0)
}

/// Column by column, with the scores and values in the type of the cache. The results of the columns are merged as
/// FlashAttention does (Dao et al., 2022, <https://arxiv.org/abs/2205.14135>): a column is read where it lies.
fn attention_of(qkv: &Tensor, shape: AttentionShape, layer: usize, segment: &Segment<'_>) -> Result<Tensor> {
    let AttentionShape { n_head, n_head_kv, head_dim, .. } = shape;
    let (tokens, group) = (segment.rows.len(), n_head / n_head_kv);
    let q = qkv.narrow(0, segment.rows.start, tokens)?.narrow(1, 0, shape.q_dim())?;
    // (n_head_kv, group * tokens, head_dim): the query heads of one KV head, one after the other
    let q = q.reshape((tokens, n_head, head_dim))?.transpose(0, 1)?.contiguous()?;
    let q = (q.reshape((n_head_kv, group * tokens, head_dim))? / (head_dim as f64).sqrt())?;
    // The sums of the weighted values and of the weights, and the greatest score so far.
    let mut so_far: Option<(Tensor, Tensor, Tensor)> = None;
    for column in segment.columns().filter(|column| column.start() < segment.end()) {
        let KvBlock { k, v } = column.layer(layer);
        let (k, v) = (k.tensor()?, v.tensor()?);
        let scores = q.to_dtype(k.dtype())?.matmul(&k.transpose(1, 2)?)?.to_dtype(DType::F32)?;
        let scores = scores.broadcast_add(&mask(shape, segment, column, q.device())?)?;
        let greatest = scores.max_keepdim(D::Minus1)?; // (n_head_kv, group * tokens, 1)
        let greatest = match &so_far {
            Some((.., before)) => greatest.maximum(before)?,
            None => greatest,
        };
        let weights = scores.broadcast_sub(&greatest)?.exp()?;
        let mut values = weights.to_dtype(v.dtype())?.matmul(v)?.to_dtype(DType::F32)?;
        let mut total = weights.sum_keepdim(D::Minus1)?;
        if let Some((values_before, total_before, before)) = so_far {
            let scale = (before - &greatest)?.exp()?;
            values = (values + values_before.broadcast_mul(&scale)?)?;
            total = (total + total_before.broadcast_mul(&scale)?)?;
        }
        so_far = Some((values, total, greatest));
    }
    let Some((values, total, _)) = so_far else { candle_core::bail!("attention over no positions") };
    let out = values.broadcast_div(&total)?.reshape((n_head, tokens, head_dim))?;
    out.transpose(0, 1)?.reshape((tokens, n_head * head_dim))
}

/// (1, group * tokens, PAGE): 0 where a query sees a position of the column. Else the lowest number, whose weight is 0 once
/// a position that is seen has been merged; minus infinity would make NaN of a column that a query does not see.
fn mask(shape: AttentionShape, segment: &Segment<'_>, column: &Column, device: &Device) -> Result<Tensor> {
    let rows = shape.n_head / shape.n_head_kv * segment.rows.len();
    let mut mask = Vec::new();
    let what = format_args!("an attention mask of {rows} queries and {PAGE} keys");
    memory::reserve(&mut mask, rows * PAGE, what).unwrap_or_else(|error| panic::resume(error));
    mask.extend((0..rows).flat_map(|row| {
        let position = segment.position(segment.rows.start + row % segment.rows.len());
        let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let sees = move |key: usize| if (first..=position).contains(&key) { 0.0 } else { f32::MIN };
        (column.start()..column.start() + PAGE).map(sees)
    }));
    Tensor::from_vec(mask, (1, rows, PAGE), device)
}

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let features = x.dim(1)? / 2;
    x.narrow(1, 0, features)?.silu()? * x.narrow(1, features, features)?
}
