//! In which numbers weights are kept after loading.

use std::fmt;
use std::str::FromStr;

/// What becomes of a file's weight matrices at loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quant {
    /// As the file has them, without loss.
    #[default]
    File,
    F32,
    F16,
    Bf16,
    /// Groups of 32 with a scale each, 8 bits.
    Int8,
    /// Groups of 32 with a scale and a minimum each, 4 bits; embedding and head keep 8.
    Int4,
}

impl Quant {
    pub const ALL: [Self; 6] = [Self::File, Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Int4];

    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|quant| quant.name() == text).ok_or_else(|| {
            format!("`{text}` is no precision of weights; choose file, f32, f16, bf16, int8 or int4")
        })
    }
}
