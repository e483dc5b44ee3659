//! What the tests on a device share: the device (or the emulator in its place), numbers and their comparison.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod sampling;

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use obol_kernels::cuda::{Buffer, Dtype, Gpu};

/// The device, for one test at a time.
pub(crate) fn gpu() -> MutexGuard<'static, Gpu> {
    static GPU: LazyLock<Mutex<Gpu>> = LazyLock::new(|| {
        Mutex::new(Gpu::open(0).expect("a CUDA device, or the emulator's libcuda.so.1 in LD_LIBRARY_PATH"))
    });
    let gpu = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    gpu.bind().expect("the device is not lost");
    gpu
}

/// A splitmix64 generator.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In -1..1
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Numbers that the type holds exactly.
    pub(crate) fn vec(&mut self, len: usize, dtype: Dtype) -> Vec<f32> {
        (0..len).map(|_| rounded(self.unit(), dtype)).collect()
    }
}

pub(crate) fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Half the distance of numbers near 1.
pub(crate) fn epsilon(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::EPSILON / 2.0,
        Dtype::F16 => f16::EPSILON.to_f32() / 2.0,
        Dtype::Bf16 => bf16::EPSILON.to_f32() / 2.0,
    }
}

pub(crate) fn bytes_of(x: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

pub(crate) fn upload(gpu: &Gpu, x: &[f32], dtype: Dtype) -> Buffer {
    gpu.upload(&bytes_of(x, dtype)).expect("the device has memory")
}

pub(crate) fn upload_u32(gpu: &Gpu, x: &[u32]) -> Buffer {
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    gpu.upload(&bytes).expect("the device has memory")
}

/// All that is in the buffer.
pub(crate) fn download(gpu: &Gpu, buffer: &Buffer, dtype: Dtype) -> Vec<f32> {
    let mut bytes = vec![0; buffer.bytes()];
    gpu.read(buffer, 0, &mut bytes).expect("the work before succeeded");
    let half = |at: &[u8]| u16::from_le_bytes([at[0], at[1]]);
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|at| f32::from_le_bytes(*at)).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|at| f16::from_bits(half(at)).to_f32()).collect(),
        Dtype::Bf16 => bytes.chunks_exact(2).map(|at| bf16::from_bits(half(at)).to_f32()).collect(),
    }
}

pub(crate) fn download_u32(gpu: &Gpu, buffer: &Buffer) -> Vec<u32> {
    let mut bytes = vec![0; buffer.bytes()];
    gpu.read(buffer, 0, &mut bytes).expect("the work before succeeded");
    bytes.as_chunks().0.iter().map(|at| u32::from_le_bytes(*at)).collect()
}

#[track_caller]
pub(crate) fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: lengths");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i}: {a} and {b}");
    }
}

/// |a - b| <= bound * (1 + |b|)
#[track_caller]
pub(crate) fn assert_close(a: &[f32], b: &[f32], bound: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: lengths");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= bound * (1.0 + b.abs()), "{what}: element {i}: {a}, expected {b}");
    }
}
