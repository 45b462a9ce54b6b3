//! What every architecture shares: a pass over the rows of one or several sequences, from embedding to head.
//!
//! ```text
//! begin       the rows of each member; columns for their keys and values; memory for the activations
//! embed       rows of the embedding table, and the angles of their positions
//! layers      the architecture's; a member that is cancelled leaves before the next one
//! head        the logits of the rows that want some
//! commit      the keys and values of the rows count as computed
//! ```
//! A pass over prompts stops after each layer, so that others get their turns. So does one over ids that were decoded
//! before, and whose keys and values are held no more. A prompt that takes more than one pass is
//! alone in its batch. Nothing but its own sequence decides the bits of a row.
//!
//! Decisions: docs/design/model.md

use std::ops::Range;

use candle_core::{Device, Storage, Tensor};

use super::batch::{Activations, Batch, Buffers, Member, Pass};
use super::chunks::{self, Chunks, Sizes};
use super::rope::Rope;
use super::sequence::{Sequence, Want};
use super::{Info, Model};
use crate::compute::kernels::{self, Phase, Weights};
use crate::compute::ops::{self, Angles, Backend, KvShape, KvType, Matrix, Norm, Ops, Segment};
use crate::error::{Error, Result};
use crate::files::gguf::{self, Gguf};
use crate::kv::table::Table;
use crate::system::sync::Cancel;
use crate::system::{memory, panic};

/// Rows of a decode pass at most: one of each sequence, and those of drafts.
const WIDTH: usize = 16;
/// Rows of a pass over ids that were decoded before: as many as the decode kernels multiply at once.
const DECODED_ROWS: usize = 8;
/// Tokens of prompts that share a pass at most. The unpacking of the weights costs as much as 10 tokens, so more would gain
/// little, and each prompt waits for the others.
const SHARED_TOKENS: usize = 128;

/// The layers of a model.
pub trait Architecture: Send + Sync + 'static {
    fn n_layers(&self) -> usize;

    /// The buffers that a layer computes in: features of a row, and what they are.
    fn buffers(&self) -> Vec<(usize, &'static str)>;

    /// Computes layer `i`: `pass.x` becomes its result, and the keys and values of the rows go to the segments.
    fn layer(
        &self,
        i: usize,
        pass: &mut Activations,
        buffers: &mut [Tensor],
        segments: &mut [Segment<'_>],
        ops: Ops<'_>,
    ) -> Result<()>;
}

/// The parts of a model that every architecture has.
pub struct Shared {
    pub hidden: usize,
    pub n_vocab: usize,
    pub context_length: usize,
    pub window: Option<usize>,
    pub kv_type: KvType,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub sizes: Sizes,
    pub rope: Rope,
    pub token_embd: Matrix,
    pub output_norm: Norm,
    /// None: `token_embd` is the head too.
    pub output: Option<Matrix>,
}

/// A model, and the back end that computes it.
pub struct Runner<A> {
    layers: A,
    shared: Shared,
    info: Info,
    kv: KvShape,
    chunks: Chunks,
    backend: Backend,
}

impl<A: Architecture> Runner<A> {
    pub fn new(layers: A, shared: Shared, gguf: &Gguf, backend: Backend) -> Self {
        let weights = gguf.parts().map(|(_, bytes)| bytes.len() as u64).sum();
        let &Shared { n_vocab, context_length, kv_type, n_head_kv, head_dim, sizes, .. } = &shared;
        let chunks = Chunks::new(sizes, weights);
        let info = Info {
            engine: "native",
            kernel: backend.kernel_name(),
            device: match backend.device() {
                Device::Cpu => "cpu",
                Device::Cuda(_) => "cuda",
                Device::Metal(_) => "metal",
            },
            n_threads: backend.n_threads(),
            file: gguf.path().display().to_string(),
            n_vocab,
            context_length,
            width: WIDTH,
            shared_tokens: SHARED_TOKENS.min(chunks.length(0, false)),
            pass_costs: backend.decode_costs(),
        };
        let device = match &backend {
            Backend::Cpu { .. } => None,
            Backend::Candle(device) => Some(device.clone()),
        };
        let kv = KvShape { n_layers: layers.n_layers(), n_head_kv, head_dim, kv_type, device };
        Runner { layers, info, kv, chunks, shared, backend }
    }

    /// The next rows of each member, with memory for them.
    fn begin(&self, batch: &mut Batch) -> Result<Pass> {
        let alone = batch.members.len() == 1;
        let phase = batch.members.first().and_then(|member| member.sequence.phase());
        let phase = phase.ok_or_else(|| Error::Internal("a pass takes sequences with ids to compute".into()))?;
        let (mut rows, mut every, mut end, mut by_layer) = (Vec::new(), phase == Phase::Decode, 0, true);
        for member in &mut batch.members {
            member.logits = 0..0;
            let sequence = &member.sequence;
            if sequence.phase() != Some(phase) {
                return Err(Error::Internal("a pass takes sequences of one phase".into()));
            }
            let next = match phase {
                Phase::Decode if sequence.decodes() => {
                    by_layer = false;
                    sequence.phases.run_end(sequence.kv.len()) - sequence.kv.len()
                }
                Phase::Decode => self.rows_without_logits(sequence),
                Phase::Prefill if alone => {
                    let (tokens, with_logits) = self.chunk(sequence);
                    every = with_logits;
                    tokens
                }
                Phase::Prefill => sequence.phases.run_end(sequence.kv.len()) - sequence.kv.len(),
            };
            rows.push(end..end + next);
            end += next;
        }
        self.reserve(batch, &rows, every)?;
        let cancels = batch.members.iter().map(|member| member.cancel.clone()).collect();
        Ok(Pass { phase, rows, cancels, by_layer, layers: 0, n_layers: self.layers.n_layers() })
    }

    /// Rows of the next pass over ids that were decoded before, and whose keys and values are computed anew.
    fn rows_without_logits(&self, sequence: &Sequence) -> usize {
        let start = sequence.kv.len();
        (sequence.phases.run_end(start).min(sequence.logits_from) - start).min(DECODED_ROWS)
    }

    /// The number of tokens of the next chunk of a prompt, and whether several of them want logits. Those that want some and
    /// those that want none are in chunks of their own.
    fn chunk(&self, sequence: &Sequence) -> (usize, bool) {
        let start = sequence.kv.len();
        let end = sequence.phases.run_end(start);
        let several = end.saturating_sub(sequence.logits_from) > 1;
        let every = several && start >= sequence.logits_from;
        let border = if several && !every { end.min(sequence.logits_from) } else { end };
        (self.chunks.length(start, every).min(border - start), every)
    }

    /// Memory for the keys, values and activations of a pass.
    fn reserve(&self, batch: &mut Batch, rows: &[Range<usize>], every: bool) -> Result<()> {
        let tables = batch.members.iter().map(|member| &member.sequence.kv).zip(rows);
        let growth = tables.map(|(table, rows)| table.growth(rows.len())).fold(0, u64::saturating_add);
        let (position, count) = (batch.members[0].sequence.kv.len(), rows.last().map_or(0, |rows| rows.end));
        if batch.activations.as_ref().is_some_and(|activations| activations.x.dim(0).ok() == Some(count)) {
            memory::check(growth, format_args!("the KV cache at position {position}"))?;
        } else {
            batch.activations = None; // frees the old ones first
            let activations = self.chunks.bytes(count, every);
            let what = format_args!("a pass over {count} tokens at position {position}");
            memory::check(growth.saturating_add(activations), what)?;
            batch.activations = Some(self.activations(count)?);
        }
        batch.members.iter_mut().zip(rows).try_for_each(|(member, rows)| member.sequence.kv.reserve(rows.len()))
    }

    fn activations(&self, rows: usize) -> Result<Activations> {
        Ok(Activations {
            x: zeros(rows, self.shared.hidden, &self.backend, "hidden states")?,
            angles: Angles::default(),
            logits: zeros(0, self.shared.n_vocab, &self.backend, "logits")?,
        })
    }

    /// The buffers of a layer of `rows` rows, which are parts of larger ones.
    fn buffers(&self, buffers: &mut Buffers, rows: usize) -> Result<Vec<Tensor>> {
        let held = buffers.0.first().map_or(Ok(0), |buffer| buffer.dim(0))?;
        if held < rows {
            buffers.0.clear(); // frees the old ones first
            let buffer = |(features, what)| zeros(rows, features, &self.backend, what);
            buffers.0 = self.layers.buffers().into_iter().map(buffer).collect::<Result<_>>()?;
        }
        Ok(buffers.0.iter().map(|buffer| buffer.narrow(0, 0, rows)).collect::<candle_core::Result<_>>()?)
    }

    fn embed(&self, members: &[Member], pass: &Pass, activations: &mut Activations, ops: Ops<'_>) -> Result<()> {
        let mut ids = Vec::new();
        let count = pass.rows.iter().map(Range::len).sum();
        memory::reserve(&mut ids, count, format_args!("{count} token ids"))?;
        let Activations { x, angles, .. } = activations;
        angles.cos.clear();
        angles.sin.clear();
        for (Member { sequence, .. }, rows) in members.iter().zip(&pass.rows) {
            ids.extend_from_slice(&sequence.ids[sequence.kv.len()..][..rows.len()]);
            self.add_angles(angles, sequence, rows.len())?;
        }
        ops.embed(&self.shared.token_embd, &ids, x)
    }

    /// The angles of the next rows of a sequence.
    fn add_angles(&self, angles: &mut Angles, sequence: &Sequence, rows: usize) -> Result<()> {
        let start = sequence.kv.len();
        self.shared.rope.extend(angles, start..start + rows, sequence.long)
    }

    /// Takes the rows of cancelled members out of a pass that others go on with, and frees their keys and values.
    fn release_cancelled(&self, batch: &mut Batch, pass: &mut Pass) -> Result<()> {
        if !pass.cancels.iter().any(Cancel::is_set) {
            return Ok(());
        }
        let goes_on = |(member, rows): (&Member, &Range<usize>)| !rows.is_empty() && !member.cancel.is_set();
        let go_on: Vec<bool> = batch.members.iter().zip(&pass.rows).map(goes_on).collect();
        let left = pass.rows.iter().zip(&go_on).filter(|(_, goes_on)| **goes_on).map(|(rows, _)| rows.len()).sum();
        let Some(before) = batch.activations.as_ref().filter(|_| left > 0) else {
            return Ok(()); // the whole pass ends
        };
        let mut after = self.activations(left)?;
        let kept = pass.rows.iter().zip(&go_on).filter(|(_, goes_on)| **goes_on).map(|(rows, _)| rows.clone());
        copy_rows(&before.x, kept, &after.x)?;
        let mut end = 0;
        pass.cancels.clear();
        for ((member, rows), goes_on) in batch.members.iter_mut().zip(&mut pass.rows).zip(go_on) {
            if goes_on {
                self.add_angles(&mut after.angles, &member.sequence, rows.len())?;
                pass.cancels.push(member.cancel.clone());
                *rows = end..end + rows.len();
                end = rows.end;
            } else {
                member.sequence.kv = Table::new(&self.kv, self.shared.window);
                *rows = 0..0;
            }
        }
        batch.activations = Some(after);
        Ok(())
    }

    /// The logits that the members want go to the batch.
    fn head(&self, batch: &mut Batch, pass: &Pass, ops: Ops<'_>) -> Result<()> {
        let Batch { members, activations: Some(activations), logits, .. } = batch else { return Ok(()) };
        logits.clear();
        let Activations { x, logits: results, .. } = activations;
        let wanted = |(member, rows): (&Member, &Range<usize>)| {
            let before = member.sequence.logits_from.saturating_sub(member.sequence.kv.len());
            rows.start + before.min(rows.len())..rows.end
        };
        let wanted: Vec<_> = members.iter().zip(&pass.rows).map(wanted).collect();
        let count: usize = wanted.iter().map(Range::len).sum();
        if count == 0 {
            return Ok(());
        }
        let some; // (count, hidden)
        let x = if count == x.dim(0)? {
            &*x
        } else {
            some = zeros(count, self.shared.hidden, &self.backend, "hidden states")?;
            copy_rows(x, wanted.iter().cloned(), &some)?;
            &some
        };
        let n_vocab = self.shared.n_vocab;
        if results.dim(0)? != count {
            *results = zeros(count, n_vocab, &self.backend, "logits")?;
        }
        let head = self.shared.output.as_ref().unwrap_or(&self.shared.token_embd);
        ops.norm_linear(x, &self.shared.output_norm, head, results)?;
        ops.check()?;
        memory::reserve(logits, count.saturating_mul(n_vocab), format_args!("{count} x {n_vocab} logits"))?;
        match &*results.storage_and_layout().0 {
            Storage::Cpu(storage) => logits.extend_from_slice(storage.as_slice()?),
            _ => logits.extend(results.flatten_all()?.to_vec1::<f32>()?),
        }
        let mut end = 0;
        for (member, rows) in members.iter_mut().zip(wanted) {
            member.logits = end..end + rows.len() * n_vocab;
            end = member.logits.end;
        }
        Ok(())
    }

    fn turn(&self, batch: &mut Batch) -> Result<bool> {
        let mut pass = match batch.pass.take() {
            Some(pass) => pass,
            None => self.begin(batch)?,
        };
        while pass.layers < pass.n_layers {
            self.release_cancelled(batch, &mut pass)?;
            let ops = self.backend.ops(pass.phase, &pass.cancels);
            let Batch { members, activations: Some(activations), buffers, .. } = batch else {
                return Err(Error::Internal("a batch lost the activations of its pass".into()));
            };
            let mut buffers = self.buffers(buffers, activations.x.dim(0)?)?;
            if pass.layers == 0 {
                self.embed(members, &pass, activations, ops)?;
            }
            let rows = members.iter_mut().zip(&pass.rows).filter(|(_, rows)| !rows.is_empty());
            let mut segments: Vec<_> = rows.map(|(m, rows)| m.sequence.kv.segment(rows.clone())).collect();
            self.layers.layer(pass.layers, activations, &mut buffers, &mut segments, ops)?;
            ops.check()?;
            pass.layers += 1;
            if pass.by_layer && pass.layers < pass.n_layers {
                batch.pass = Some(pass);
                return Ok(true);
            }
        }
        self.head(batch, &pass, self.backend.ops(pass.phase, &pass.cancels))?;
        for (member, rows) in batch.members.iter_mut().zip(&pass.rows) {
            member.sequence.kv.commit(rows.len());
        }
        Ok(false)
    }

    /// Compares the keys and values of `ids` more tokens with the available memory.
    fn check_memory(&self, sequence: &Sequence, ids: usize) -> Result<()> {
        let positions = sequence.ids.len() + ids;
        let more = positions.saturating_sub(sequence.kv.len());
        let held = self.shared.window.map_or(more, |window| more.min(window + chunks::LONGEST));
        memory::check(sequence.kv.growth(held), format_args!("the KV cache of {positions} tokens"))
    }
}

impl<A: Architecture> Model for Runner<A> {
    fn info(&self) -> &Info {
        &self.info
    }

    fn kv_bytes(&self, positions: usize) -> usize {
        positions.min(self.shared.window.unwrap_or(positions)) * self.kv.position_bytes()
    }

    fn sequence(&self) -> Result<Sequence> {
        Ok(Sequence::new(Table::new(&self.kv, self.shared.window)))
    }

    fn append(&self, sequence: &mut Sequence, ids: &[u32], phase: Phase, want: Want) -> Result<()> {
        let n_vocab = self.shared.n_vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(Error::Value(format!("token id {id} is outside the vocabulary of {n_vocab}")));
        }
        self.check_memory(sequence, ids.len())?;
        if sequence.ids.capacity() < sequence.ids.len() + ids.len() {
            let more = ids.len().max(sequence.ids.len()); // room for as many again
            memory::reserve(&mut sequence.ids, more, format_args!("{more} token ids"))?;
        }
        sequence.append(ids, phase, want);
        let long = self.shared.rope.is_long(sequence.ids.len());
        if long != sequence.long {
            sequence.restart(long, sequence.ids.len() - ids.len());
        }
        Ok(())
    }

    fn room(&self, sequence: &Sequence) -> usize {
        self.shared.rope.room(sequence.ids.len())
    }

    fn forward(&self, batch: &mut Batch) -> Result<bool> {
        panic::catch(|| self.turn(batch))
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        match &self.backend {
            Backend::Cpu { pool, .. } => pool.run(tasks, task),
            Backend::Candle(_) => (0..tasks).for_each(task),
        }
    }
}

/// A tensor for activations.
fn zeros(rows: usize, features: usize, backend: &Backend, what: &str) -> Result<Tensor> {
    let length = rows.saturating_mul(features);
    let values = memory::filled(0f32, length, format_args!("{rows} tokens of {features} {what}"))?;
    Ok(Tensor::from_vec(values, (rows, features), backend.device())?)
}

/// Copies parts of the rows of `from` to `to`, one after the other. Candle's `cat` would abort the process if the system
/// refused the memory of its result.
fn copy_rows(from: &Tensor, parts: impl Iterator<Item = Range<usize>>, to: &Tensor) -> Result<()> {
    let mut end = 0;
    for rows in parts.filter(|rows| !rows.is_empty()) {
        to.slice_set(&from.narrow(0, rows.start, rows.len())?, 0, end)?;
        end += rows.len();
    }
    Ok(())
}

/// A norm whose weight is a one-dimensional tensor of the file.
pub fn norm(tensor: &gguf::Tensor, eps: f32, backend: &Backend) -> Result<Norm> {
    let cols = tensor.shape.iter().product();
    let weights = Weights { format: ops::format(tensor)?, cols, bytes: tensor.bytes() };
    let mut values = memory::filled(0f32, cols, format_args!("tensor `{}`", tensor.name))?;
    kernels::dequantize(weights, &mut values);
    Ok(Norm { weight: Tensor::from_vec(values, cols, backend.device())?, eps })
}
