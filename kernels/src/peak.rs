//! What this machine can do at most, measured with the pool's threads: integer and floating point operations
//! in registers, and bytes read. Other figures are put beside these; nothing is decided by them.
//!
//! The one place of this crate that reads a clock. Each figure is the best of several runs of some
//! milliseconds, about a tenth of a second in all, since other processes only make it worse.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::{Cpu, Isa};

/// How long each figure is looked for.
const TIME: Duration = Duration::from_millis(100);
/// Rounds of a compute loop in one run: half a millisecond, so that some run has every core to itself.
const ROUNDS: usize = 100_000;
/// Bytes of a wide load, and of the pieces that threads read.
const LINE: usize = 64;

/// Operations a second in registers, all threads together; a multiplication and an addition are two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// uint8 times int8, summed in int32, with the widest dot product of the instruction set.
    pub int8_ops: f64,
    pub f32_ops: f64,
}

impl Peaks {
    /// Takes about 0.2 s.
    #[must_use]
    pub fn measure(cpu: &Cpu) -> Self {
        Self { int8_ops: compute(cpu, int8), f32_ops: compute(cpu, f32_fma) }
    }
}

/// Bytes a second at which the pool's threads read `buffer` over and over, each its own part. Takes about 0.1 s,
/// or three readings.
///
/// # Panics
/// When the buffer is shorter than one cache line for each thread.
#[must_use]
pub fn read_speed(cpu: &Cpu, buffer: &[u8]) -> f64 {
    let threads = cpu.pool().threads();
    let part = buffer.len() / threads / LINE * LINE;
    assert!(part > 0, "a buffer of {} bytes for {threads} threads", buffer.len());
    let isa = cpu.isa();
    let seconds = best(|| {
        cpu.pool().run(threads, &|thread| {
            black_box(sum(isa, &buffer[thread * part..][..part]));
        });
    });
    (threads * part) as f64 / seconds
}

/// Runs `kernel`, which returns how many operations it did, on every thread.
fn compute(cpu: &Cpu, kernel: fn(Isa) -> usize) -> f64 {
    let (threads, isa) = (cpu.pool().threads(), cpu.isa());
    let operations = kernel(isa);
    let seconds = best(|| {
        cpu.pool().run(threads, &|_| {
            black_box(kernel(isa));
        });
    });
    (threads * operations) as f64 / seconds
}

/// Seconds of the fastest run.
fn best(mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < TIME {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn int8(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is only made with an instruction set that the machine has.
        Isa::Avx512Vnni => unsafe { x86::int8_avx512() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::int8_avx2() },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { aarch64::int8() },
        _ => portable_int8(),
    }
}

fn f32_fma(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is only made with an instruction set that the machine has.
        Isa::Avx512Vnni => unsafe { x86::f32_avx512() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::f32_avx2() },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { aarch64::f32() },
        _ => portable_f32(),
    }
}

/// Sums whole lines of `bytes` in a way that reads each once.
fn sum(isa: Isa, bytes: &[u8]) -> u64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is only made with an instruction set that the machine has.
        Isa::Avx512Vnni => unsafe { x86::sum_avx512(bytes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::sum_avx2(bytes) },
        _ => portable_sum(bytes),
    }
}

fn portable_int8() -> usize {
    const LANES: usize = 64;
    let (a, b) = (black_box([3u8; LANES]), black_box([-5i8; LANES]));
    let mut sums = [0i32; LANES];
    for _ in 0..ROUNDS / 8 {
        for lane in 0..LANES {
            sums[lane] = sums[lane].wrapping_add(i32::from(a[lane]) * i32::from(b[lane]));
        }
        black_box(&mut sums);
    }
    ROUNDS / 8 * LANES * 2
}

fn portable_f32() -> usize {
    const LANES: usize = 32;
    let (a, b) = (black_box([0.5f32; LANES]), black_box([1.0f32; LANES]));
    let mut sums = [0f32; LANES];
    for _ in 0..ROUNDS {
        for lane in 0..LANES {
            sums[lane] = sums[lane] * a[lane] + b[lane];
        }
    }
    black_box(sums);
    ROUNDS * LANES * 2
}

fn portable_sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; LINE / 8];
    for line in bytes.as_chunks::<LINE>().0 {
        for (sum, eight) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*eight));
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Independent sums hide the instructions' latency: sixteen need no more than the registers there are with
/// AVX-512, ten with AVX2.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{LINE, ROUNDS};

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) fn int8_avx512() -> usize {
        const SUMS: usize = 16;
        let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(-5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        ROUNDS * SUMS * 64 * 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) fn f32_avx512() -> usize {
        const SUMS: usize = 16;
        let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(1.0)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        ROUNDS * SUMS * 16 * 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) fn sum_avx512(bytes: &[u8]) -> u64 {
        const SUMS: usize = 8;
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let (lines, _) = bytes.as_chunks::<LINE>();
        let (many, few) = lines.as_chunks::<SUMS>();
        for many in many {
            for (sum, line) in sums.iter_mut().zip(many) {
                // SAFETY: a line has the 64 bytes of a register.
                *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        for (sum, line) in sums.iter_mut().zip(few) {
            // SAFETY: as above.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
        let all = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi64(a, b));
        _mm512_reduce_add_epi64(all) as u64
    }

    /// Without VNNI a dot of four bytes takes three instructions.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn int8_avx2() -> usize {
        const SUMS: usize = 10;
        let (a, b, ones) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi8(-5), _mm256_set1_epi16(1)));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..ROUNDS / 2 {
            // Another `a` each round, or the products would be made once for all rounds.
            let a = black_box(a);
            for (index, sum) in sums.iter_mut().enumerate() {
                let other = _mm256_xor_si256(a, _mm256_set1_epi8(index as i8));
                let pairs = _mm256_maddubs_epi16(other, b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
        ROUNDS / 2 * SUMS * 32 * 2
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_avx2() -> usize {
        const SUMS: usize = 10;
        let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(1.0)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        ROUNDS * SUMS * 8 * 2
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn sum_avx2(bytes: &[u8]) -> u64 {
        const SUMS: usize = 8;
        let mut sums = [_mm256_setzero_si256(); SUMS];
        let (halves, _) = bytes.as_chunks::<{ LINE / 2 }>();
        let (many, few) = halves.as_chunks::<SUMS>();
        for many in many {
            for (sum, half) in sums.iter_mut().zip(many) {
                // SAFETY: half a line has the 32 bytes of a register.
                *sum = _mm256_add_epi64(*sum, unsafe { _mm256_loadu_si256(half.as_ptr().cast()) });
            }
        }
        for (sum, half) in sums.iter_mut().zip(few) {
            // SAFETY: as above.
            *sum = _mm256_add_epi64(*sum, unsafe { _mm256_loadu_si256(half.as_ptr().cast()) });
        }
        let all = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi64(a, b));
        let mut lanes = [0u64; 4];
        // SAFETY: four lanes of eight bytes.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all) };
        lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }
}

/// Sixteen independent sums, as with AVX-512; reading is left to plain Rust.
#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    use super::ROUNDS;
    use crate::simd::sdot;

    const SUMS: usize = 16;

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn int8() -> usize {
        let (a, b) = black_box((vdupq_n_s8(3), 0.5));
        let mut sums = [vdupq_n_s32(0); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = sdot(*sum, a, b);
            }
        }
        black_box(sums);
        ROUNDS * SUMS * 16 * 2
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn f32() -> usize {
        let (a, b) = black_box((vdupq_n_f32(0.5), vdupq_n_f32(1.0)));
        let mut sums = [vdupq_n_f32(0.0); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, a, b);
            }
        }
        black_box(sums);
        ROUNDS * SUMS * 4 * 2
    }
}
