//! Declarations of variables and parameters: `.align 4 .b8 name[24]`, `.param .u64 .ptr .align 1 p`.

use super::text::integer;
use super::types::Type;

/// One declared name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Declaration<'a> {
    pub(crate) name: &'a str,
    pub(crate) align: u32,
    /// Bytes of one element.
    pub(crate) element: u32,
    /// Elements; zero for an array of no stated length (`smem[]`).
    pub(crate) count: u64,
    /// Its elements are `.f32` or `.f64`: initial values may be written as floats.
    pub(crate) float: bool,
}

impl Declaration<'_> {
    pub(crate) fn bytes(&self) -> u64 {
        self.count * u64::from(self.element)
    }
}

/// Reads what stands between the state space and the `;` or `=`.
pub(crate) fn declaration(text: &str) -> Option<Declaration<'_>> {
    let head = text.find('[').unwrap_or(text.len());
    let mut words = text[..head].split_whitespace();
    let (mut name, mut align, mut element, mut lanes, mut float) = ("", None, None, 1, false);
    while let Some(word) = words.next() {
        match word.strip_prefix('.') {
            Some("align") => align = words.next()?.parse().ok(),
            Some("v2") => lanes = 2,
            Some("v4") => lanes = 4,
            Some(kind) => {
                // `.ptr .global`, `.visible` and the like say nothing of sizes.
                if let Some(kind) = Type::named(kind) {
                    element = Some(kind.bytes());
                    float = kind.is_float();
                }
            }
            None => name = word,
        }
    }
    let element = element?;
    let mut count = lanes;
    for length in text[head..].split(']').map(str::trim).filter(|t| !t.is_empty()) {
        let length = length.strip_prefix('[')?.trim();
        count *= if length.is_empty() { 0 } else { integer(length)? };
    }
    // A `.ptr .align n` speaks of the memory pointed to.
    let align = if text.contains(".ptr") { None } else { align };
    let align = align.unwrap_or(element * lanes as u32);
    (!name.is_empty()).then_some(Declaration { name, align, element, count, float })
}
