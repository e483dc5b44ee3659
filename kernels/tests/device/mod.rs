//! What the tests on a device share: the device (or the emulator in its place), and numbers in its memory.
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

/// As the type holds it.
pub(crate) fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Each as the type holds it.
pub(crate) fn rounded(x: &[f32], dtype: Dtype) -> Vec<f32> {
    x.iter().map(|x| round(*x, dtype)).collect()
}

/// Half the distance of numbers near 1: the largest relative error of rounding to the type.
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
