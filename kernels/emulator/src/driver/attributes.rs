//! What a device says of itself.

use super::Driver;
use super::codes::{Error, Result};
use super::config::COMPUTE_CAPABILITY;
use super::launch::{BLOCK_MAX, BLOCK_THREADS_MAX, GRID_MAX};
use super::modules::BLOCKS_PER_SM;

/// Multiprocessors of a device: few, so that what is split over all of them stays small.
pub(super) const MULTIPROCESSORS: u32 = 8;
/// Shared memory of a block whose kernel does not ask for more, in bytes.
pub(super) const SHARED_BYTES_PER_BLOCK: u32 = 48 << 10;
/// Shared memory of a multiprocessor, in bytes.
pub(super) const SHARED_BYTES_PER_SM: u32 = 228 << 10;
pub(super) const THREADS_PER_SM: u32 = 2048;
/// The registers a thread is said to need. There is no machine code that could tell.
pub(super) const REGISTERS_PER_THREAD: u32 = 32;
const REGISTERS_PER_SM: u32 = 65_536;
/// One more than the last attribute there is.
const ATTRIBUTES_END: u32 = 145;

impl Driver {
    /// `cuDeviceGetAttribute`. What the emulator does not have is 0.
    pub(super) fn attribute(&self, device: usize, attribute: u32) -> Result<i32> {
        self.device(device)?;
        let value = match attribute {
            1 => BLOCK_THREADS_MAX,
            2..=4 => BLOCK_MAX[attribute as usize - 2],
            5..=7 => GRID_MAX[attribute as usize - 5],
            8 => SHARED_BYTES_PER_BLOCK,
            9 => 64 << 10,
            // Warp, then the pitch of copies.
            10 => 32,
            11 => i32::MAX as u32,
            12 | 82 => REGISTERS_PER_SM,
            // Clocks in kHz.
            13 => 1_500_000,
            36 => 2_000_000,
            14 => 512,
            16 => MULTIPROCESSORS,
            // Overlap of copies and kernels, concurrent kernels, unified addresses, priorities, cached
            // loads, preemption, registered host memory, pools.
            15 | 31 | 41 | 78 | 79 | 80 | 90 | 99 | 115 => 1,
            33 => device as u32 + 1,
            37 => 256,
            38 => 32 << 20,
            39 => THREADS_PER_SM,
            40 => 2,
            75 => COMPUTE_CAPABILITY.0,
            76 => COMPUTE_CAPABILITY.1,
            81 => SHARED_BYTES_PER_SM,
            97 => self.config.shared_bytes_max,
            106 => BLOCKS_PER_SM,
            111 => 1 << 10,
            0 | ATTRIBUTES_END.. => return Err(Error::INVALID_VALUE),
            _ => 0,
        };
        i32::try_from(value).map_err(|_| Error::INVALID_VALUE)
    }

    /// Sixteen bytes that tell devices apart; the same in each process.
    pub(crate) fn uuid(device: usize) -> [u8; 16] {
        let mut uuid = *b"obol-emulated\0\0\0";
        uuid[14..].copy_from_slice(&(device as u16).to_be_bytes());
        uuid
    }
}
