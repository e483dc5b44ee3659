//! Operations on elements that do not know each other, copies of rows, and feeding.

use super::{Rows, act_index, count, elements_shape};
use crate::Act;
use crate::cuda::gpu::{Shape, arguments};
use crate::cuda::{Buffer, DeviceRows, Dtype, Gpu, GpuError, RECORD_BYTES};

/// Elements of a type that a thread takes: 16 bytes.
fn vector(dtype: Dtype) -> usize {
    16 / dtype.bytes()
}

/// Tokens that a step takes from the draws of the step ahead.
#[derive(Clone, Copy)]
pub struct Feeds<'a> {
    /// Pairs (row, draw) of u32.
    pub list: &'a Buffer,
    /// How many of them.
    pub many: usize,
    /// (rows) u32: the step's tokens.
    pub tokens: &'a Buffer,
    pub rows: usize,
    /// What was drawn, as [`Gpu::sample`] leaves it.
    pub records: &'a Buffer,
    pub draws: usize,
}

impl Gpu {
    /// out (rows, width) = act(gate) * up, all of one type. Gate and up may be parts of the same rows.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn act_mul(
        &self,
        act: Act,
        gate: DeviceRows<'_>,
        up: DeviceRows<'_>,
        rows: usize,
        width: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        for (what, x) in [("act-mul: gate", gate), ("act-mul: up", up), ("act-mul: out", out)] {
            x.check(what, rows, width);
            assert_eq!(x.dtype, out.dtype, "{what}: another type");
        }
        let (wide, gate, up, to) = (count("act-mul", width), Rows::of(gate), Rows::of(up), Rows::of(out));
        let shape = elements_shape("act-mul", rows, width, vector(out.dtype));
        let kernel = self.kernels().rows.act_mul[act_index(act)][out.dtype as usize];
        // SAFETY: these are the kernel's arguments; all rows are inside their buffers.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, gate, up, to]) }
    }

    /// x (rows, width) = act(x): an MLP without a gate.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn act(&self, act: Act, x: DeviceRows<'_>, rows: usize, width: usize) -> Result<(), GpuError> {
        x.check("act", rows, width);
        let (wide, to) = (count("act", width), Rows::of(x));
        let shape = elements_shape("act", rows, width, vector(x.dtype));
        let kernel = self.kernels().rows.act[act_index(act)][x.dtype as usize];
        // SAFETY: these are the kernel's arguments; all rows are inside the buffer.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, to]) }
    }

    /// x (rows, width) f32 += delta.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn add(
        &self,
        x: DeviceRows<'_>,
        delta: DeviceRows<'_>,
        rows: usize,
        width: usize,
    ) -> Result<(), GpuError> {
        self.add_and_cast(x, Some(delta), rows, width, None)
    }

    /// x (rows, width) f32 += delta; out = x, rounded to the type of `delta` and `out`.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn add_cast(
        &self,
        x: DeviceRows<'_>,
        delta: DeviceRows<'_>,
        rows: usize,
        width: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        assert_eq!(delta.dtype, out.dtype, "add: delta and out have different types");
        self.add_and_cast(x, Some(delta), rows, width, Some(out))
    }

    /// out (rows, width) = x, f32, rounded to the type of `out`.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn cast(
        &self,
        x: DeviceRows<'_>,
        rows: usize,
        width: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.add_and_cast(x, None, rows, width, Some(out))
    }

    fn add_and_cast(
        &self,
        x: DeviceRows<'_>,
        delta: Option<DeviceRows<'_>>,
        rows: usize,
        width: usize,
        out: Option<DeviceRows<'_>>,
    ) -> Result<(), GpuError> {
        assert_eq!(x.dtype, Dtype::F32, "add: x is f32");
        x.check("add: x", rows, width);
        delta.iter().for_each(|delta| delta.check("add: delta", rows, width));
        out.iter().for_each(|out| out.check("add: out", rows, width));
        let dtype = delta.or(out).expect("one of them is there").dtype;
        let wide = count("add", width);
        let optional = |rows: Option<DeviceRows<'_>>| rows.map_or(Rows::NONE, Rows::of);
        let (x, delta, out) = (Rows::of(x), optional(delta), optional(out));
        let shape = elements_shape("add", rows, width, 4);
        let kernel = self.kernels().rows.add[dtype as usize];
        // SAFETY: these are the kernel's arguments; all rows that are there are inside their buffers.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, x, delta, out]) }
    }

    /// x (rows, width) *= factor.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn scale(&self, x: DeviceRows<'_>, rows: usize, width: usize, factor: f32) -> Result<(), GpuError> {
        x.check("scale", rows, width);
        let (wide, to) = (count("scale", width), Rows::of(x));
        let shape = elements_shape("scale", rows, width, vector(x.dtype));
        let kernel = self.kernels().rows.scale[x.dtype as usize];
        // SAFETY: these are the kernel's arguments; all rows are inside the buffer.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, to, factor]) }
    }

    /// x (rows, width) f32 = cap * tanh(x / cap).
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit, or the cap is not over zero.
    pub fn softcap(&self, x: DeviceRows<'_>, rows: usize, width: usize, cap: f32) -> Result<(), GpuError> {
        assert!(cap > 0.0, "softcap: a cap of {cap}");
        assert_eq!(x.dtype, Dtype::F32, "softcap: x is f32");
        x.check("softcap", rows, width);
        let (wide, to) = (count("softcap", width), Rows::of(x));
        let shape = elements_shape("softcap", rows, width, vector(x.dtype));
        // SAFETY: these are the kernel's arguments; all rows are inside the buffer.
        unsafe { self.launch(self.kernels().rows.softcap, shape, &mut arguments![wide, to, cap]) }
    }

    /// out (count, width): row i is row `list[i]` of the `rows` rows of x, and zeros where there is no such row
    /// (u32::MAX: a list's padding). `list`: u32.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn gather_rows(
        &self,
        x: DeviceRows<'_>,
        rows: usize,
        list: &Buffer,
        many: usize,
        width: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        assert_eq!(x.dtype, out.dtype, "gather: different types");
        x.check("gather: x", rows, width);
        out.check("gather: out", many, width);
        assert!(list.bytes() >= many * 4, "gather: the list is not ({many})");
        let (wide, has, list) = (count("gather", width), count("gather", rows), list.address());
        let shape = elements_shape("gather", many, width, vector(x.dtype));
        let kernel = self.kernels().rows.gather[usize::from(x.dtype.bytes() == 4)];
        let (x, out) = (Rows::of(x), Rows::of(out));
        // SAFETY: these are the kernel's arguments; rows that the list names wrongly are not read.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, has, list, x, out]) }
    }

    /// `tokens[row]` = the token of `records[draw]`, for each pair (row, draw). A pair outside the rows or the draws
    /// (u32::MAX: padding) does nothing; where nothing was drawn, token 0 is fed.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When a buffer is too small.
    pub fn feed(&self, feeds: Feeds<'_>) -> Result<(), GpuError> {
        let Feeds { list, many, tokens, rows, records, draws } = feeds;
        assert!(list.bytes() >= many * 8, "feed: the list is not ({many}, 2)");
        assert!(tokens.bytes() >= rows * 4, "feed: tokens are not ({rows})");
        assert!(records.bytes() >= draws * RECORD_BYTES, "feed: not {draws} records");
        let shape = Shape::new([count("feed", many.div_ceil(128)), 1, 1], 128);
        let (many, rows, draws) = (count("feed", many), count("feed", rows), count("feed", draws));
        let words = count("feed", RECORD_BYTES / 4);
        let (list, tokens, records) = (list.address(), tokens.address(), records.address());
        let mut arguments = arguments![many, list, rows, tokens, draws, words, records];
        // SAFETY: these are the kernel's arguments; pairs outside the buffers are passed over.
        unsafe { self.launch(self.kernels().rows.feed, shape, &mut arguments) }
    }
}
