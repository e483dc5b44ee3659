//! A CUDA device in host memory: it runs the very PTX that ships, so that CUDA code is tested where no
//! GPU is. Test-only, never shipped.
//!
//! [`ptx`] reads the text of a module, [`exec`] runs one launch of a kernel, [`memory`] holds what a
//! kernel may touch, [`fault`] says what a kernel did wrong. It checks more than a device does: fresh
//! memory is NaN, each access must lie inside an allocation, and a barrier or shuffle that waits for
//! lanes that never come stops the kernel. [`driver`] is the driver API around them, [`nvml`] and [`nccl`]
//! stand in for the libraries of these names.
//!
//! It knows nothing of speed, of machine code (SASS) and its registers, or of weak memory order; and
//! `*.approx` operations are as exact here as the host's.
//!
//! # Running a program on it
//!
//! The shared library stands in for libcuda. Make a folder with links to it, and name that folder in
//! `LD_LIBRARY_PATH`:
//!
//! ```text
//! ln -s /path/to/libobol_emulator.so DIR/libcuda.so.1
//! ln -s /path/to/libobol_emulator.so DIR/libnvidia-ml.so.1
//! ln -s /path/to/libobol_emulator.so DIR/libnccl.so.2
//! LD_LIBRARY_PATH=DIR program
//! ```
//!
//! The loader takes links to one file for one library, so all of them share their devices in a process.
//!
//! A kernel that fails says on stderr what it did, where, and at which instruction; so do calls that a
//! driver would refuse without a reason.
//!
//! # Streams
//!
//! A stream is a queue, and its work is done when somebody waits: at a synchronisation, at a copy to
//! pageable memory, at a query (which does the work, and says that it was not done yet). So page-locked
//! memory that is read too early holds stale data, always and not just sometimes. Events carry the real
//! time at which they were reached.
//!
//! # What is not there
//!
//! Managed and external memory, memory of the host in kernels, of one device in kernels of another, pools
//! besides each device's default, textures, clusters, cooperative launches, graphs built node by node,
//! compressed fat binaries; in NCCL sends, receives and splits. Streams do not run side by side, so
//! nothing is learnt of speed or of races between streams.
//!
//! # Environment
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `OBOL_EMULATOR_MEMORY_MB` | memory of each device, in MiB | 4096 |
//! | `OBOL_EMULATOR_DEVICES` | number of devices; 0 is a machine without a GPU | 1 |
//! | `OBOL_EMULATOR_EAGER` | do work when it is enqueued | off |
//! | `OBOL_EMULATOR_TRACE` | tell each launch with its grid and time on stderr | off |
//! | `OBOL_EMULATOR_THREADS` | host threads that run a launch; 0 is one for each core | 0 |
//! | `OBOL_EMULATOR_WARP_ORDER` | `forward`, or `reverse`: the warps of a block run last to first | forward |
//! | `OBOL_EMULATOR_RACECHECK` | stop at races on shared memory | off |
//! | `OBOL_EMULATOR_DRIVER_VERSION` | version of the driver, as 13000; an older one refuses newer PTX | 13000 |
//! | `OBOL_EMULATOR_SHARED_KB` | shared memory a block may ask for, in KiB | 227 |
//! | `OBOL_EMULATOR_STATS` | tell launches, allocations and copied bytes on stderr at the end | off |

pub mod driver;
pub mod exec;
mod fatbin;
pub mod fault;
pub mod memory;
pub mod nccl;
pub mod nvml;
pub mod ptx;
