//! Chance that a case's number decides, and the values that chance likes.

/// xorshift64*, begun with a well-mixed seed.
pub(crate) struct Random(u64);

/// Texts that mean something in some file.
pub(crate) const WORDS: &[&str] = &[
    "",
    "llama",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "gpt2",
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "default",
    "none",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
    "longrope",
    "su",
    "gptq",
    "gptq_v2",
    "awq",
    "gemm",
    "gemv",
    "sliding_attention",
    "full_attention",
    "BOOL",
    "U8",
    "I8",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "F8_E4M3",
    "F4",
    "bpe",
    "spm",
    "t5",
    "wpm",
    "qwen35",
    "../model.safetensors",
    ".",
    "/dev/zero",
    "model.safetensors",
    "config.json",
    "\u{0}",
    "ü€𝄞",
];

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mixed = (seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mut random = Self((mixed ^ (mixed >> 29)) | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 33) as usize) % bound.max(1)
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// An integer at which readers stumble; `near` is what was there.
    pub(crate) fn integer(&mut self, near: u64) -> u64 {
        let bit = 1u64 << self.below(64);
        let small = self.below(40) as u64;
        let any = self.next();
        let near_ones =
            [near.wrapping_add(1), near.wrapping_sub(1), near / 3 * 2, near.wrapping_mul(2), near ^ bit];
        let limits =
            [0, 1, u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 21, 1 << 20];
        match self.below(7) {
            0 | 1 => self.pick(&near_ones),
            2 | 3 => self.pick(&limits),
            4 => bit,
            5 => small,
            _ => any,
        }
    }

    pub(crate) fn float(&mut self) -> f64 {
        let any = f64::from_bits(self.next());
        let like =
            [0.0, -1.0, 1.0, 0.5, 1e-30, 1e30, 3e38, 1e300, 1e-300, 4.5, 7.0, f64::NAN, f64::INFINITY, any];
        self.pick(&like)
    }

    /// Spoils bytes from `start` on without knowing them: a few values, the length, or parts of `other`.
    pub(crate) fn spoil_bytes(
        &mut self,
        bytes: &mut Vec<u8>,
        start: usize,
        end: usize,
        other: &[u8],
    ) -> String {
        let end = end.min(bytes.len());
        let at = start + self.below(end.saturating_sub(start));
        match self.below(8) {
            0..=2 => {
                let count = 1 + self.below(4);
                for _ in 0..count {
                    let at = start + self.below(end.saturating_sub(start));
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = match self.below(3) {
                            0 => *byte ^ (1 << (self.0 % 8)),
                            1 => [0, 1, 0x7f, 0x80, 0xff, b'"', b'{'][(self.0 % 7) as usize],
                            _ => (self.0 >> 20) as u8,
                        };
                    }
                }
                format!("{count} bytes near {at}")
            }
            3 => {
                let width = self.pick(&[4, 8]);
                let value = self.integer(u64::from(bytes.get(at).copied().unwrap_or(0)));
                if let Some(field) = bytes.get_mut(at..at + width) {
                    field.copy_from_slice(&value.to_le_bytes()[..width]);
                }
                format!("{value} at {at}")
            }
            4 => {
                let at = if self.one_in(2) { at } else { self.below(bytes.len()) };
                bytes.truncate(at);
                format!("cut at {at}")
            }
            5 => {
                let more = self.pick(&[1, 31, 4096, 100_000]);
                bytes.resize(bytes.len() + more, 0);
                format!("{more} bytes more")
            }
            6 => {
                let from = self.below(other.len());
                let len = self.below(other.len() - from).min(1 << self.below(18));
                let until = (at + len).min(bytes.len());
                let at = at.min(until);
                let until = if self.one_in(2) { until } else { at };
                bytes.splice(at..until, other[from..from + len].iter().copied());
                format!("{len} bytes of another file's {from} at {at}")
            }
            _ => {
                let until = (at + 1 + self.below(64)).min(bytes.len());
                bytes.drain(at.min(until)..until);
                format!("{at} to {until} left out")
            }
        }
    }
}
