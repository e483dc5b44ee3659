//! The decoder as a queue of steps, with recorded decode steps where there are some.

use obol_kernels::cuda::{BatchShape, DecodeBucket, GpuError, SamplingPasses};

use super::graphs::Graphs;
use super::queue::DEPTH;
use super::{CudaDecoder, Pool, failed};
use crate::batch::ForwardError;
use crate::queue::{Step, StepOutput, StepQueue};

impl CudaDecoder {
    /// Records decode steps; without them, where the device refuses, each step is launched operation by operation.
    pub(super) fn record(&mut self) {
        let Some(pool) = &mut self.pool else { return };
        // The old ones go first: they hold memory.
        pool.graphs = Graphs::none();
        if !self.graphs {
            return;
        }
        let group = self.group();
        let stage = self.stage();
        let Some(pool) = &self.pool else { return };
        let limits = pool.plan.limits();
        let most = stage.work.logit_rows_most().min(limits.spans).min(limits.rows);
        let parts = DecodeBucket::parts_of(limits.context);
        let graphs = Graphs::record(stage.gpu, most, parts, limits.partials, |bucket| {
            let DecodeBucket { sequences, .. } = bucket;
            stage.run_layers(bucket.shape(group), sequences)?;
            stage.run_head(0, sequences, sequences)?;
            pool.queue.sample(stage.gpu, stage.work, sequences, sequences, SamplingPasses::ALL)
        });
        let graphs = graphs.unwrap_or_else(|error| {
            tracing::warn!("decode steps are not recorded as graphs: {error}");
            Graphs::none()
        });
        // Devices that share a step pad it alike.
        let agreed = self.member.as_ref().is_none_or(|member| member.agree(graphs.len()));
        let graphs = if agreed { graphs } else { Graphs::none() };
        tracing::debug!("{} decode graphs are recorded", graphs.len());
        if let Some(pool) = &mut self.pool {
            pool.graphs = graphs;
        }
    }

    /// Puts a step, which is checked, into the stream.
    fn enqueue(&mut self, step: &Step) -> Result<(), GpuError> {
        self.gpu.bind()?;
        let batch = &step.batch;
        let group = self.group();
        let (Some(work), Some(pool)) = (&self.work, &mut self.pool) else {
            unreachable!("a step is checked before it runs")
        };
        if let Some(words) = pool.queue.words_for(step) {
            pool.queue.grow(&self.gpu, words)?;
            self.record();
            return self.enqueue(step);
        }
        let Pool { cache, plan, queue, graphs, .. } = pool;
        queue.begin(&self.gpu)?;
        let decodes =
            batch.spans.iter().all(|span| span.rows.len() == 1) && step.draws.len() == batch.spans.len();
        let longest = batch.positions.iter().max().map_or(0, |position| *position as usize + 1);
        let recorded =
            decodes.then(|| graphs.find(batch.spans.len(), DecodeBucket::parts_of(longest))).flatten();
        let (shape, places) = match recorded {
            Some((bucket, _)) => {
                plan.plan_decode(&batch.spans, &batch.positions, &batch.block_tables, bucket);
                (bucket.shape(group), bucket.sequences)
            }
            None => {
                let shape = plan.plan(&batch.spans, &batch.positions, &batch.block_tables);
                (shape, step.draws.len())
            }
        };
        self.gpu.send_batch(plan, &mut queue.slot().plan, &cache.batch)?;
        queue.slot().inputs.send(
            &self.gpu,
            work,
            batch,
            recorded.map_or(0, |(bucket, _)| bucket.sequences),
        )?;
        let passes = queue.send(&self.gpu, step, work, places)?;
        match recorded {
            Some((_, graph)) => graph.launch()?,
            None => self.launch(shape, step.draws.len(), passes)?,
        }
        let Some(pool) = &mut self.pool else { unreachable!("it was there") };
        pool.queue.finish(&self.gpu, step.draws.len())
    }

    /// Whether the step can be submitted now.
    pub(super) fn check(&self, step: &Step) -> Result<(), ForwardError> {
        let (in_flight, ahead) = self.pool.as_ref().map_or((0, None), |pool| pool.queue.position());
        assert!(in_flight < DEPTH, "a step too many in flight; this is a bug");
        step.check(self.batch_limits()?, ahead)?;
        if self.can_grow(step) { Ok(()) } else { self.check_room(step) }
    }

    /// Whether there may be other memory for the step: what was drawn before is lost with the old.
    fn can_grow(&self, step: &Step) -> bool {
        let in_flight = self.pool.as_ref().map_or(0, |pool| pool.queue.position().0);
        in_flight == 0 && step.feeds.is_empty()
    }

    /// Whether there is room for a step beside the one in flight.
    fn check_room(&self, step: &Step) -> Result<(), ForwardError> {
        let (batch, limits) = (&step.batch, self.limits());
        let fits = batch.tokens.len() <= limits.rows
            && batch.spans.len() <= limits.sequences
            && batch.block_tables.len() <= limits.table_entries
            && step.draws.len() <= limits.sequences;
        if fits { Ok(()) } else { Err(ForwardError(format!("a step is over what was reserved, {limits:?}"))) }
    }

    /// A step operation by operation.
    fn launch(&self, shape: BatchShape, draws: usize, passes: SamplingPasses) -> Result<(), GpuError> {
        let stage = self.stage();
        stage.run_layers(shape, draws)?;
        if draws == 0 {
            return Ok(());
        }
        stage.run_head(0, draws, draws)?;
        let Some(pool) = &self.pool else { unreachable!("it was there") };
        pool.queue.sample(stage.gpu, stage.work, shape.rows as usize, draws, passes)
    }

    /// Nothing is in flight.
    pub(super) fn forget(&mut self) {
        if let Some(pool) = &mut self.pool {
            pool.queue.clear();
        }
    }

    /// After an error nothing is in flight.
    fn abandon(&mut self, error: GpuError) -> ForwardError {
        self.forget();
        // Whether that works or not: the error is the one to be told.
        let _waited = self.gpu.synchronize();
        failed(error)
    }
}

impl StepQueue for CudaDecoder {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn submit(&mut self, step: &Step) -> Result<(), ForwardError> {
        let checked = self.check(step).and_then(|()| {
            if self.can_grow(step) {
                self.make_room(&step.batch)?;
            }
            self.check_room(step)
        });
        if let Err(error) = checked {
            self.forget();
            return Err(error);
        }
        self.enqueue(step).map_err(|error| self.abandon(error))
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError> {
        let Some(pool) = &mut self.pool else { unreachable!("a step is in flight") };
        pool.queue.wait(output).map_err(|error| self.abandon(error))
    }
}
