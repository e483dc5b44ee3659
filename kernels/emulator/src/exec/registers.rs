//! The registers of a warp: each register is a row of 32 lanes that lie side by side, so that one
//! instruction's loop over the lanes becomes a few vector instructions of the host.

/// Lanes of a warp.
pub(crate) const LANES: usize = 32;
/// The mask of all lanes.
pub(crate) const ALL: u32 = u32::MAX;

/// Where a register's row starts, in units of 32 bytes (one byte a lane).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row(pub(crate) u32);

impl Row {
    /// An operand that is not there.
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) fn exists(self) -> bool {
        self != Self::NONE
    }
}

/// What a lane of a row may hold.
///
/// # Safety
/// Every pattern of bits is a value, there is no padding, and the alignment is at most 32.
pub(crate) unsafe trait Word: Copy + Send + 'static {
    fn zero() -> Self;
}

macro_rules! words {
    ($($word:ty),*) => {
        $(
            // SAFETY: numbers have no padding and no invalid patterns.
            unsafe impl Word for $word {
                #[inline(always)]
                fn zero() -> Self {
                    0 as $word
                }
            }
        )*
    };
}
words!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The register file of one warp.
pub(crate) struct Registers {
    lines: Box<[Line]>,
}

impl Registers {
    /// `units` of 32 bytes, all 0xff: a float read before it is written is NaN.
    pub(crate) fn new(units: u32) -> Self {
        Self { lines: vec![Line([0xff; 64]); units.div_ceil(2) as usize].into_boxed_slice() }
    }

    fn check<T: Word>(&self, row: Row) {
        let end = row.0 as usize * LANES + LANES * size_of::<T>();
        assert!(end <= self.lines.len() * size_of::<Line>(), "a row lies in the register file");
    }

    /// The 32 lanes of a register.
    #[inline(always)]
    pub(crate) fn row<T: Word>(&self, row: Row) -> &[T; LANES] {
        self.check::<T>(row);
        // SAFETY: checked to lie inside; rows start at multiples of 32 bytes; any bits are a `T`.
        unsafe { &*self.lines.as_ptr().cast::<u8>().add(row.0 as usize * LANES).cast() }
    }

    /// The 32 lanes of a register, to be written.
    #[inline(always)]
    pub(crate) fn row_mut<T: Word>(&mut self, row: Row) -> &mut [T; LANES] {
        self.check::<T>(row);
        // SAFETY: as in `row`, and `self` is borrowed alone.
        unsafe { &mut *self.lines.as_mut_ptr().cast::<u8>().add(row.0 as usize * LANES).cast() }
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub(crate) fn write<T: Word>(&mut self, row: Row, mask: u32, values: &[T; LANES]) {
        let target = self.row_mut::<T>(row);
        if mask == ALL {
            *target = *values;
        } else {
            for lane in 0..LANES {
                if mask >> lane & 1 != 0 {
                    target[lane] = values[lane];
                }
            }
        }
    }

    /// Lanes whose predicate is true.
    #[inline(always)]
    pub(crate) fn mask(&self, row: Row) -> u32 {
        let bytes = self.row::<u8>(row);
        let mut mask = 0;
        for (part, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
            // The product gathers the lowest bits of eight predicates in its top byte.
            let lowest = u64::from_le_bytes(*eight) & 0x0101_0101_0101_0101;
            let gathered = lowest.wrapping_mul(0x0102_0408_1020_4080) >> 56;
            mask |= (gathered as u32) << (8 * part);
        }
        mask
    }

    /// Sets every lane of a row of `bytes` a lane to the low bytes of `value`.
    pub(crate) fn fill(&mut self, row: Row, bytes: u32, value: u64) {
        match bytes {
            1 => *self.row_mut(row) = [value as u8; LANES],
            2 => *self.row_mut(row) = [value as u16; LANES],
            4 => *self.row_mut(row) = [value as u32; LANES],
            _ => *self.row_mut(row) = [value; LANES],
        }
    }
}

/// The lanes of a mask, lowest first.
#[inline(always)]
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest.wrapping_sub(1);
        (lane < LANES).then_some(lane)
    })
}
