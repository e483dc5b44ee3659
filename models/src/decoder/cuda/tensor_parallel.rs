//! One model over several CUDA devices that compute each layer together.
//!
//! As on CPUs, each device has some heads with their part of every KV block, and some of the MLPs' width; what they
//! add to the residual is summed over all, by NCCL in the order of their streams. Embedding and head are whole on
//! each: all have the same logits, bit for bit, and draw the same tokens, so that nothing else need be exchanged.
//! Each device has a thread of its own, and the first the caller's. Invariant: all carry out the same orders. After a
//! failure of one the sums of all are given up, and the next order finds a new group.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use obol_kernels::cuda::{Communicator, GpuError, GroupId, MemoryView};

use super::graphs::Graphs;
use super::{CudaDecoder, HostWeights, failed, not_loaded};
use crate::batch::{Batch, CausalLm, DeviceMemory, ForwardError};
use crate::communicator::{Aborted, Communicator as HostCommunicator};
use crate::cut::Rank;
use crate::decoder::group::{Group, Meetings, Work};
use crate::error::LoadError;
use crate::load::LoadOptions;
use crate::queue::{Step, StepLimits, StepOutput, StepQueue};
use crate::spec::QkNorm;

/// A model whose layers are computed by several CUDA devices together.
pub struct CudaTensorParallel {
    first: CudaDecoder,
    others: Group<Order>,
    links: Arc<Links>,
    /// Each device's.
    memory: Vec<MemoryView>,
    /// Bytes, all devices together.
    weight_bytes: u64,
}

/// What a device has of its group.
pub(super) struct Member {
    rank: Rank,
    links: Arc<Links>,
    communicator: Option<Arc<Communicator>>,
}

/// How the devices of a group meet.
struct Links {
    /// Of their threads.
    host: HostCommunicator,
    /// Each device's own.
    devices: Vec<Mutex<Option<Arc<Communicator>>>>,
    /// Not yet joined, or given up.
    broken: AtomicBool,
}

/// What all ranks do.
#[derive(Default)]
struct Order {
    what: What,
    /// For [`What::Forward`] its batch alone.
    step: Step,
}

#[derive(Default, Clone, Copy)]
enum What {
    #[default]
    Wait,
    Forward,
    Submit,
    Reserve(StepLimits),
    Allocate {
        blocks: usize,
        block_size: usize,
    },
    Join(GroupId),
    Leave,
}

impl Links {
    fn device(&self, rank: usize) -> MutexGuard<'_, Option<Arc<Communicator>>> {
        self.devices[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meetings for Links {
    fn reset(&self) {
        self.host.reset();
    }

    fn abort(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.host.abort();
        for rank in 0..self.devices.len() {
            if let Some(communicator) = &*self.device(rank) {
                communicator.abort();
            }
        }
    }
}

impl Member {
    pub(super) fn communicator(&self) -> Option<&Communicator> {
        self.communicator.as_deref()
    }

    /// Whether all devices say the same number, none of them having failed.
    pub(super) fn agree(&self, number: usize) -> bool {
        // Both sums are exact: the numbers are small.
        let number = number as f32;
        let mut sums = [number, number * number];
        let Ok(()) = self.links.host.all_reduce(self.rank.index, &mut sums) else { return false };
        sums[0] * sums[0] == sums[1] * self.rank.of as f32
    }

    /// Waits until all have come.
    fn meet(&self) -> Result<(), Aborted> {
        self.links.host.all_reduce(self.rank.index, &mut [])
    }
}

impl CudaDecoder {
    fn carry_out(&mut self, order: &Order, output: &mut StepOutput) -> Result<(), ForwardError> {
        match order.what {
            What::Wait => self.wait(output),
            What::Forward => self.forward(&order.step.batch).map(drop),
            What::Submit => self.submit(&order.step),
            What::Reserve(limits) => self.reserve(limits),
            What::Allocate { blocks, block_size } => self.allocate_kv(blocks, block_size),
            What::Join(group) => self.join(&group),
            What::Leave => {
                self.pool = None;
                self.leave();
                Ok(())
            }
        }
    }

    /// Joins a group, having left the one before; nothing is in flight then.
    fn join(&mut self, group: &GroupId) -> Result<(), ForwardError> {
        self.forget();
        self.leave();
        self.gpu.synchronize().map_err(failed)?;
        let Some(member) = &mut self.member else { unreachable!("a rank is a member") };
        // Joining waits for the others, who may have failed before.
        member.meet()?;
        let Rank { index, of } = member.rank;
        let communicator = Arc::new(self.gpu.join(group, index, of).map_err(failed)?);
        *member.links.device(index) = Some(Arc::clone(&communicator));
        member.communicator = Some(communicator);
        self.record();
        Ok(())
    }

    /// Leaves the group, and what was recorded with it.
    fn leave(&mut self) {
        if let Some(pool) = &mut self.pool {
            pool.graphs = Graphs::none();
        }
        let Some(member) = &mut self.member else { unreachable!("a rank is a member") };
        member.communicator = None;
        let left = member.links.device(member.rank.index).take();
        drop(left);
    }
}

impl CudaTensorParallel {
    /// A rank on each device of these numbers, as [`CudaDecoder::new`] makes one.
    ///
    /// # Errors
    /// When NCCL is not there, a device cannot be used or has no memory, or such models do not run on several.
    ///
    /// # Panics
    /// When the weights are cut for another number of ranks, or the system refuses a thread.
    pub fn new(mut host: HostWeights, ordinals: &[usize], options: &LoadOptions) -> Result<Self, LoadError> {
        assert_eq!(ordinals.len(), host.ranks(), "weights cut for as many ranks");
        if host.spec.qk_norm == QkNorm::Full {
            return Err(LoadError::Options(format!(
                "tensor parallel: a {} model norms all heads together, which does not run on several CUDA devices; \
                 leave --tensor-parallel away",
                host.spec.architecture
            )));
        }
        GroupId::new().map_err(not_loaded)?;
        let spec = host.spec_of_rank();
        let layers = std::mem::take(&mut host.ranks);
        let links = Arc::new(Links {
            host: HostCommunicator::new(ordinals.len()),
            devices: ordinals.iter().map(|_| Mutex::default()).collect(),
            broken: AtomicBool::new(true),
        });
        let loaded: Vec<Result<CudaDecoder, LoadError>> = thread::scope(|scope| {
            let load = |(layers, &ordinal)| {
                let (host, spec) = (&host, spec.clone());
                scope.spawn(move || CudaDecoder::of_rank(host, spec, layers, ordinal, options))
            };
            let threads: Vec<_> = layers.into_iter().zip(ordinals).map(load).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        let mut ranks = loaded.into_iter().collect::<Result<Vec<_>, _>>()?;
        for (rank, decoder) in Rank::all(ordinals.len()).zip(&mut ranks) {
            decoder.member = Some(Member { rank, links: Arc::clone(&links), communicator: None });
        }
        let memory = ranks.iter().map(|rank| rank.gpu.memory_view()).collect();
        let weight_bytes = ranks.iter().map(CudaDecoder::weight_bytes).sum();
        let first = ranks.remove(0);
        let work = |mut rank: CudaDecoder| -> Work<Order> {
            let mut output = StepOutput::default();
            Box::new(move |order| rank.carry_out(order, &mut output))
        };
        let others = Group::new(Arc::clone(&links), ranks.into_iter().map(work).collect());
        let mut model = Self { first, others, links, memory, weight_bytes };
        model.mend().map_err(|ForwardError(error)| LoadError::Device(error))?;
        Ok(model)
    }

    /// Bytes of weights on all devices together.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// What computes, and how: changes when its speed may.
    pub fn device(&self) -> String {
        format!("{} x{}", self.first.device(), self.ranks())
    }

    fn ranks(&self) -> usize {
        self.memory.len()
    }

    /// Joins the devices to a new group, if there is none; nothing is in flight then.
    fn mend(&mut self) -> Result<(), ForwardError> {
        if !self.links.broken.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let group = GroupId::new();
        let joined = group.map_err(failed).and_then(|group| self.order(What::Join(group)));
        if joined.is_err() {
            self.links.broken.store(true, Ordering::SeqCst);
        }
        joined
    }

    fn order(&mut self, what: What) -> Result<(), ForwardError> {
        let Self { first, others, .. } = self;
        let own = Order { what, step: Step::default() };
        others.run(|order| order.what = what, || first.carry_out(&own, &mut StepOutput::default()))
    }
}

impl Drop for CudaTensorParallel {
    fn drop(&mut self) {
        // Together: a device that leaves may wait for the others to do so. A group that has failed has nobody to tell.
        let _left = self.order(What::Leave);
    }
}

impl CausalLm for CudaTensorParallel {
    fn reserve(&mut self, limits: StepLimits) -> Result<(), ForwardError> {
        self.mend()?;
        self.order(What::Reserve(limits))
    }

    /// As if all devices had as little free memory as the one that has least.
    fn device_memory(&self) -> Result<Option<DeviceMemory>, ForwardError> {
        let memory = self.memory.iter().map(MemoryView::memory).collect::<Result<Vec<_>, GpuError>>();
        self.first.gpu.bind().map_err(failed)?;
        let least = |of: fn(&(u64, u64)) -> u64, all: &[(u64, u64)]| {
            all.iter().map(of).min().unwrap_or(0) * all.len() as u64
        };
        let memory = memory.map_err(failed)?;
        Ok(Some(DeviceMemory {
            free: least(|(free, _)| *free, &memory),
            total: least(|(_, total)| *total, &memory),
        }))
    }

    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        Some(self)
    }

    fn vocab_size(&self) -> usize {
        self.first.vocab_size()
    }

    fn context_length(&self) -> usize {
        self.first.context_length()
    }

    /// Of all devices together.
    fn kv_bytes_per_token(&self) -> u64 {
        self.first.kv_bytes_per_token() * self.ranks() as u64
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        self.mend()?;
        let result = self.order(What::Allocate { blocks, block_size });
        if result.is_err() {
            // So that no device keeps a pool where another has none.
            self.order(What::Leave)?;
        }
        result
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        self.mend()?;
        let Self { first, others, .. } = self;
        batch.check(first.batch_limits()?)?;
        let write = |order: &mut Order| {
            order.what = What::Forward;
            order.step.batch.copy_from(batch);
        };
        others.run(write, || first.forward(batch).map(drop))?;
        Ok(&self.first.logits)
    }
}

impl StepQueue for CudaTensorParallel {
    fn depth(&self) -> usize {
        self.first.depth()
    }

    fn submit(&mut self, step: &Step) -> Result<(), ForwardError> {
        self.mend()?;
        let Self { first, others, .. } = self;
        if let Err(error) = first.check(step) {
            // All forget what is in flight, as the first would alone.
            self.links.broken.store(true, Ordering::SeqCst);
            self.mend()?;
            return Err(error);
        }
        let write = |order: &mut Order| {
            order.what = What::Submit;
            order.step.copy_from(step);
        };
        others.run(write, || first.submit(step))
    }

    /// The first device's outcome: the others draw the same. Its time is the first device's.
    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError> {
        let Self { first, others, .. } = self;
        others.run(|order| order.what = What::Wait, || first.wait(output))
    }
}
