//! A device: its context, its one stream, and its kernels.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::GpuError;
use super::attention::AttentionKernels;
use super::products::ProductKernels;
use super::rows::RowKernels;
use super::sampling::SamplingKernels;

/// The CUDA version that the kernels' PTX was made with, as the driver counts.
const CUDA: i32 = 13_000;

/// The oldest compute capability that the kernels are made for.
const CAPABILITY: (i32, i32) = (8, 0);

/// Dynamic shared memory that a kernel has without asking for more.
const SHARED: u32 = 48 * 1024;

#[repr(C, align(16))]
struct Aligned<T>(T);

/// Fat binaries by the names of their sources.
static MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    pub ordinal: usize,
    pub name: String,
    /// As NVML and nvidia-smi say it: `GPU-` and hex.
    pub uuid: String,
    pub capability: (i32, i32),
    pub multiprocessors: usize,
    /// Bytes.
    pub memory: u64,
    /// As 1000 * major + 10 * minor.
    pub driver_cuda: i32,
}

/// A CUDA device with one stream.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    facts: DeviceFacts,
    kernels: Kernels,
}

/// A device's memory, to be asked for from any thread.
pub struct MemoryView(Arc<CudaContext>);

impl MemoryView {
    /// Free and total memory in bytes, all processes' use considered. Makes the device the calling thread's.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn memory(&self) -> Result<(u64, u64), GpuError> {
        let (free, total) = self
            .0
            .mem_get_info()
            .map_err(|error| GpuError::of("asking for the device's free memory", 0, error))?;
        Ok((free as u64, total as u64))
    }
}

/// All kernels, by the files of their operations.
pub(crate) struct Kernels {
    pub(crate) products: ProductKernels,
    pub(crate) attention: AttentionKernels,
    pub(crate) rows: RowKernels,
    pub(crate) sampling: SamplingKernels,
}

/// The modules of a context, which stay loaded until the process ends.
pub(crate) struct Modules(Vec<(&'static str, sys::CUmodule)>);

/// A kernel, ready to be launched.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
}

// SAFETY: functions belong to their context, not to a thread.
unsafe impl Send for Kernel {}
// SAFETY: as above; they are only read.
unsafe impl Sync for Kernel {}

/// Blocks, threads of a block, and dynamic shared memory in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared: u32,
}

impl Shape {
    pub(crate) fn new(grid: [u32; 3], threads: u32) -> Self {
        Self { grid, block: [threads, 1, 1], shared: 0 }
    }
}

/// A kernel's arguments, as the driver wants them: the address of each.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        [$(std::ptr::from_ref(&$value).cast::<std::ffi::c_void>().cast_mut()),*]
    };
}
pub(crate) use arguments;

impl Modules {
    fn load() -> Result<Self, GpuError> {
        let load = |(name, image): &(&'static str, &[u8])| {
            // SAFETY: the image is a whole fat binary, aligned, and static.
            let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }
                .map_err(|error| GpuError::of(&format!("loading the kernels of {name}.cu"), 0, error))?;
            Ok((*name, module))
        };
        MODULES.iter().map(load).collect::<Result<_, _>>().map(Self)
    }

    /// The kernel `name` of `module`.cu, allowed up to `shared` bytes of dynamic shared memory.
    ///
    /// To be asked for once, not at each launch.
    ///
    /// # Errors
    /// When the device cannot give so much shared memory.
    ///
    /// # Panics
    /// When there is no such kernel: a bug.
    pub(crate) fn kernel(&self, module: &str, name: &str, shared: u32) -> Result<Kernel, GpuError> {
        let loaded = self.0.iter().find(|(known, _)| *known == module);
        let (_, loaded) = loaded.unwrap_or_else(|| panic!("no kernels of {module}.cu; this is a bug"));
        let text = CString::new(name).expect("a kernel's name");
        // SAFETY: the module is loaded for as long as the process lives.
        let function = unsafe { result::module::get_function(*loaded, text) }
            .unwrap_or_else(|error| panic!("no kernel {name} in {module}.cu: {error}; this is a bug"));
        if shared > SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).expect("shared memory is small");
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(function, attribute, bytes) }.map_err(
                |error| GpuError::of(&format!("giving {name} {shared} bytes of shared memory"), 0, error),
            )?;
        }
        Ok(Kernel { function })
    }
}

impl Gpu {
    /// Devices that the driver sees.
    ///
    /// # Errors
    /// When there is no driver, or it is too old.
    pub fn count() -> Result<usize, GpuError> {
        Self::start_driver()?;
        Self::count_started()
    }

    /// As [`Gpu::count`], of a driver that is loaded.
    fn count_started() -> Result<usize, GpuError> {
        let count =
            result::device::get_count().map_err(|error| GpuError::of("counting devices", 0, error))?;
        Ok(usize::try_from(count).expect("the driver counts from 0"))
    }

    /// Loads the driver; its CUDA version.
    fn start_driver() -> Result<i32, GpuError> {
        // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        match result::init() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Err(GpuError::NoDevice { ordinal: 0, count: 0 });
            }
            Err(error) => return Err(GpuError::of("starting the NVIDIA driver", 0, error)),
        }
        let mut version = 0;
        // SAFETY: it writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(|error| GpuError::of("asking for the driver's version", 0, error))?;
        if version < CUDA { Err(GpuError::DriverTooOld { has: version, needs: CUDA }) } else { Ok(version) }
    }

    /// What device `ordinal` is, and its memory. Loads no kernels.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn examine(ordinal: usize) -> Result<(DeviceFacts, MemoryView), GpuError> {
        Self::enter(ordinal).map(|(facts, context)| (facts, MemoryView(context)))
    }

    /// Makes device `ordinal` the calling thread's.
    fn enter(ordinal: usize) -> Result<(DeviceFacts, Arc<CudaContext>), GpuError> {
        let driver_cuda = Self::start_driver()?;
        let count = Self::count_started()?;
        if ordinal >= count {
            return Err(GpuError::NoDevice { ordinal, count });
        }
        let asking = |error| GpuError::of("asking the device what it is", 0, error);
        let context =
            CudaContext::new(ordinal).map_err(|error| GpuError::of("opening the device", 0, error))?;
        let name = context.name().map_err(asking)?;
        let capability = context.compute_capability().map_err(asking)?;
        if capability < CAPABILITY {
            return Err(GpuError::TooOldDevice { name, capability });
        }
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(asking)?;
        let facts = DeviceFacts {
            ordinal,
            name,
            uuid: uuid(context.uuid().map_err(asking)?.bytes.map(|byte| byte.cast_unsigned())),
            capability,
            multiprocessors: usize::try_from(multiprocessors).expect("a device has some"),
            memory: context.total_mem().map_err(asking)? as u64,
            driver_cuda,
        };
        Ok((facts, context))
    }

    /// Opens device `ordinal` and loads all kernels.
    ///
    /// # Errors
    /// When there is no driver or no such device, or one of them is too old.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        let (facts, context) = Self::enter(ordinal)?;
        let stream = context.new_stream().map_err(|error| GpuError::of("making a stream", 0, error))?;
        let modules = Modules::load()?;
        let kernels = Kernels {
            products: ProductKernels::load(&modules)?,
            attention: AttentionKernels::load(&modules)?,
            rows: RowKernels::load(&modules)?,
            sampling: SamplingKernels::load(&modules)?,
        };
        Ok(Self { context, stream, facts, kernels })
    }

    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Free and total memory in bytes, all processes' use considered.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn memory(&self) -> Result<(u64, u64), GpuError> {
        self.memory_view().memory()
    }

    pub fn memory_view(&self) -> MemoryView {
        MemoryView(self.context.clone())
    }

    /// Makes the device the calling thread's. Every thread that uses a device does it first.
    ///
    /// # Errors
    /// When the device is lost, or an earlier call failed where that could not be said.
    pub fn bind(&self) -> Result<(), GpuError> {
        self.context.bind_to_thread().map_err(|error| GpuError::of("using the device", 0, error))
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(|error| GpuError::of("waiting for the device", 0, error))
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Puts a launch into the stream; a grid without blocks does nothing.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and type, and what they point to is as the
    /// kernel expects for this shape.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        arguments: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        let [x, y, z] = shape.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let [bx, by, bz] = shape.block;
        // SAFETY: by the caller's promise.
        unsafe {
            result::launch_kernel(
                kernel.function,
                (x, y, z),
                (bx, by, bz),
                shape.shared,
                self.raw_stream(),
                arguments,
            )
        }
        .map_err(|error| GpuError::of("launching a kernel", 0, error))
    }
}

fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::from("GPU");
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}
