//! What a group of benches reached, beside what the machine can do at most.

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Throughput};
use obol_kernels::Cpu;
use obol_kernels::peak::{Peaks, read_speed};

/// About what the copies of weights take that the benches go through.
const BUFFER: usize = 64 << 20;

/// Which peak an operation is measured against.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Int8,
    F32,
}

/// What one run computes and reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    kind: Kind,
    operations: usize,
    bytes: usize,
}

impl Work {
    pub(crate) fn of(kind: Kind, operations: usize, bytes: usize) -> Self {
        Self { kind, operations, bytes }
    }
}

/// The measured runs of a group: name, work and median seconds.
#[derive(Debug, Default)]
pub(crate) struct Figures(Vec<(String, Work, f64)>);

impl Figures {
    /// Benches `run` and keeps its median, if the command line's filter takes it.
    pub(crate) fn measure(
        &mut self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        name: String,
        work: Work,
        mut run: impl FnMut(),
    ) {
        let mut seconds = Vec::new();
        group.throughput(Throughput::Elements(work.operations as u64));
        group.bench_function(&name, |bencher| {
            bencher.iter_custom(|times| {
                let start = Instant::now();
                (0..times).for_each(|_| run());
                let took = start.elapsed();
                seconds.push(took.as_secs_f64() / times as f64);
                took.max(Duration::from_nanos(1))
            });
        });
        seconds.sort_by(f64::total_cmp);
        if let Some(median) = seconds.get(seconds.len() / 2) {
            self.0.push((name, work, *median));
        }
    }

    /// Measures the peaks and prints each figure beside them.
    pub(crate) fn print(&self, cpu: &Cpu) {
        if self.0.is_empty() {
            return;
        }
        let peaks = Peaks::measure(cpu);
        let read = read_speed(cpu, &vec![1; BUFFER]);
        let (threads, isa) = (cpu.pool().threads(), cpu.isa());
        println!(
            "\npeaks of {threads} threads, {isa}: int8 {:.0} GOPS, f32 {:.0} GOPS, reading {} MiB {:.1} GB/s",
            peaks.int8_ops / 1e9,
            peaks.f32_ops / 1e9,
            BUFFER >> 20,
            read / 1e9
        );
        println!("{:<26}{:>10}{:>7}{:>12}{:>7}", "", "GOPS", "%", "GB/s", "%");
        for (name, work, seconds) in &self.0 {
            let peak = match work.kind {
                Kind::Int8 => peaks.int8_ops,
                Kind::F32 => peaks.f32_ops,
            };
            let (operations, bytes) = (work.operations as f64 / seconds, work.bytes as f64 / seconds);
            println!(
                "{name:<26}{:>10.1}{:>7.1}{:>12.2}{:>7.1}",
                operations / 1e9,
                operations / peak * 100.0,
                bytes / 1e9,
                bytes / read * 100.0
            );
        }
        println!();
    }
}
