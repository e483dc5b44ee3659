//! One model over several devices that compute each layer together.
//!
//! Each rank has some heads with their part of every KV block, some of the MLPs' width, and some of the
//! vocabulary's rows of the head; what they add to the residual is summed over all. The first rank runs in the
//! caller's thread and has the logits. To the caller it is one model: a failure of a rank is the step's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use obol_kernels::{Cpu, Pool};

use crate::batch::{Batch, CausalLm, EachSpan, ForwardError};
use crate::communicator::Communicator;
use crate::cut::Rank;

use super::group::{Group, Work};
use super::{Decoder, Member, Weights};

/// A model whose layers are computed by several ranks together.
pub struct TensorParallel {
    first: Decoder,
    others: Group<Order>,
}

/// What all ranks do.
#[derive(Default)]
struct Order {
    what: What,
    batch: Batch,
}

#[derive(Default)]
enum What {
    /// Runs `batch`.
    #[default]
    Forward,
    Allocate {
        blocks: usize,
        block_size: usize,
    },
}

impl TensorParallel {
    /// A rank on each of `cpus`; the first is used by the thread that calls.
    ///
    /// # Panics
    /// When the weights are cut for another number of ranks, or the system refuses a thread.
    pub fn new(weights: &Arc<Weights>, cpus: Vec<Cpu>) -> Self {
        let of = cpus.len();
        assert_eq!(of, weights.ranks(), "weights cut for as many ranks");
        let communicator = Arc::new(Communicator::new(of));
        let mut ranks = Rank::all(of).zip(cpus).map(|(rank, cpu)| {
            let member = Member { rank, others: Some(Arc::clone(&communicator)) };
            Decoder::of_rank(Arc::clone(weights), cpu, member)
        });
        let first = ranks.next().expect("there is a first rank: the number of kv heads divides by it");
        let work = |mut rank: Decoder| -> Work<Order> { Box::new(move |order| rank.carry_out(order)) };
        let others = Group::new(Arc::clone(&communicator), ranks.map(work).collect());
        Self { first, others }
    }
}

impl Decoder {
    fn carry_out(&mut self, order: &Order) -> Result<(), ForwardError> {
        match order.what {
            What::Forward => self.forward(&order.batch).map(drop),
            What::Allocate { blocks, block_size } => self.allocate_kv(blocks, block_size),
        }
    }
}

impl Order {
    fn forward(&mut self, batch: &Batch) {
        self.what = What::Forward;
        self.batch.copy_from(batch);
    }
}

impl CausalLm for TensorParallel {
    fn vocab_size(&self) -> usize {
        self.first.vocab_size()
    }

    fn hidden_size(&self) -> Option<usize> {
        self.first.hidden_size()
    }

    fn context_length(&self) -> usize {
        self.first.context_length()
    }

    /// Of all ranks together.
    fn kv_bytes_per_token(&self) -> u64 {
        self.first.kv_bytes_per_token() * self.first.weights.ranks() as u64
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        let Self { first, others } = self;
        let result = others.run(
            |order| order.what = What::Allocate { blocks, block_size },
            || first.allocate_kv(blocks, block_size),
        );
        if result.is_err() {
            // So that no rank keeps a pool where another has none.
            let what = What::Allocate { blocks: 0, block_size: first.kv.block_size() };
            let block_size = first.kv.block_size();
            others.run(|order| order.what = what, || first.allocate_kv(0, block_size))?;
        }
        result
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        let Self { first, others } = self;
        batch.check(first.limits())?;
        others.run(|order| order.forward(batch), || first.forward(batch).map(drop))?;
        Ok(&first.work.logits[..batch.logit_rows.len() * first.spec.vocab])
    }

    fn workers(&self) -> usize {
        self.first.workers()
    }

    fn overlaps(&self) -> bool {
        self.first.overlaps()
    }

    fn forward_each(
        &mut self,
        batch: &Batch,
        meanwhile: &mut dyn FnMut(),
        each: EachSpan<'_>,
    ) -> Result<(), ForwardError> {
        let Self { first, others } = self;
        batch.check(first.limits())?;
        // What the caller does meanwhile is no part of the ranks' work, and so is its panic.
        let mut callers_panic: Option<Box<dyn Any + Send>> = None;
        let mut guarded = || callers_panic = catch_unwind(AssertUnwindSafe(&mut *meanwhile)).err();
        let result = others.run(
            |order| order.forward(batch),
            || Pool::beside(&mut guarded, || first.forward(batch).map(drop)),
        );
        if let Some(panic) = callers_panic {
            resume_unwind(panic);
        }
        result?;
        first.give_each(batch, each);
        Ok(())
    }
}
