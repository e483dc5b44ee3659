//! Launching PTX texts from tests.

use obol_emulator::exec::{self, Launch, LaunchStats, Options, WarpOrder};
use obol_emulator::fault::Fault;
use obol_emulator::memory::Memory;
use obol_emulator::ptx::Module;

/// A device with one module on it.
pub(crate) struct Device {
    pub memory: Memory,
    pub module: Module,
    pub options: Options,
}

/// A kernel's arguments, laid out one behind the other.
#[derive(Default)]
pub(crate) struct Arguments(Vec<u8>);

impl Arguments {
    pub(crate) fn with<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(N), 0);
        self.0.extend(bytes);
        self
    }
}

/// What a test may put into device memory and read back.
pub(crate) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for u64 {}
impl Plain for f32 {}
impl Plain for f64 {}

impl Device {
    /// A device with the module of `body`, behind the lines that every module has.
    pub(crate) fn new(body: &str) -> Self {
        let memory = Memory::new(1 << 28);
        let text = format!(".version 9.0\n.target sm_80\n.address_size 64\n{body}");
        let module = Module::parse(&text, &memory).expect("the text is a module");
        let options = Options { threads: 2, warp_order: WarpOrder::Forward, racecheck: false };
        Self { memory, module, options }
    }

    /// Address of a copy of `values` on the device.
    pub(crate) fn put<T: Plain>(&self, values: &[T]) -> u64 {
        let address = self.memory.alloc(size_of_val(values) as u64).expect("fits");
        let to = std::ptr::with_exposed_provenance_mut::<T>(address as usize);
        // SAFETY: the allocation is as large as the slice.
        unsafe { to.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        address
    }

    /// Address of fresh memory for `count` values.
    pub(crate) fn room<T: Plain>(&self, count: usize) -> u64 {
        self.memory.alloc((count * size_of::<T>()) as u64).expect("fits")
    }

    /// `count` values at `address`.
    pub(crate) fn get<T: Plain>(&self, address: u64, count: usize) -> Vec<T> {
        let (_, end) = self.memory.find(address).expect("lives");
        assert!(address + (count * size_of::<T>()) as u64 <= end);
        let from = std::ptr::with_exposed_provenance::<T>(address as usize);
        // SAFETY: checked to lie in one live allocation.
        unsafe { std::slice::from_raw_parts(from, count) }.to_vec()
    }

    /// Runs `grid` blocks of `block` threads along x.
    pub(crate) fn run(
        &self,
        name: &str,
        grid: u32,
        block: u32,
        arguments: &Arguments,
    ) -> Result<LaunchStats, Fault> {
        self.launch(name, [[grid, 1, 1], [block, 1, 1]], 0, arguments)
    }

    /// Runs a grid of blocks, `shape` being both sizes, with dynamic shared memory.
    pub(crate) fn launch(
        &self,
        name: &str,
        shape: [[u32; 3]; 2],
        dynamic_shared: u32,
        arguments: &Arguments,
    ) -> Result<LaunchStats, Fault> {
        let [grid, block] = shape;
        let function = self.module.function(name).expect("the module has the kernel");
        let params = &arguments.0;
        exec::launch(
            &Launch { function: &function, grid, block, dynamic_shared, params },
            &self.memory,
            &self.options,
        )
    }
}

/// Arguments from numbers and addresses: `arguments![out, 3_u32]`.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        $crate::support::Arguments::default()$(.with($value.to_le_bytes()))*
    };
}
pub(crate) use arguments;
