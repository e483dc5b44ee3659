//! A walk over a GGUF header before it is read: what candle's reader does not check.
//!
//! candle's reader keeps the last of two equal keys, divides by an alignment of zero, and refuses unknown
//! tensor types without saying which tensor has one; this walk finds all three, and counts and lengths
//! that cannot be. It keeps no values. Invariant: it reads no byte outside the slice and allocates only the
//! names it has seen.

use std::collections::HashSet;

use crate::error::LoadError;
use crate::foreign;
use crate::gguf::SUPPORTED_TYPES;

/// Longest header (metadata and tensor table) that is read; those of the largest vocabularies have 20 MB.
const HEADER_BYTES_MAX: usize = 128 << 20;
/// Most items of all arrays together: each takes 32 bytes when it is read, whatever it has in the file. Those of
/// the largest vocabularies have 2 million.
const ITEMS_MAX: u64 = 1 << 23;
const ARRAY_DEPTH_MAX: usize = 4;
const DIMENSIONS_MAX: u32 = 4;

const TYPE_U32: u32 = 4;
const TYPE_BOOL: u32 = 7;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// Checks the header at the start of `file`.
///
/// # Errors
/// When something is missing, twice there, absurdly large or of an unknown type.
pub(crate) fn check_header(file: &[u8]) -> Result<(), LoadError> {
    let magic = &file[..file.len().min(4)];
    if magic != b"GGUF" {
        let found = || format!("it begins with \"{}\", not \"GGUF\"", magic.escape_ascii());
        return Err(LoadError::NotGguf(foreign::recognize(file).map_or_else(found, String::from)));
    }
    let mut header = Reader { bytes: file, at: 4, items: 0 };
    match header.u32("the version")? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err(LoadError::UnsupportedGguf(
                "it is big-endian; download or convert the little-endian one".into(),
            ));
        }
        version => return Err(LoadError::Version(version)),
    }
    let tensors = header.u64("the number of tensors")?;
    let keys = header.u64("the number of keys")?;
    // The shortest key has 13 bytes, the shortest tensor entry 24.
    let least = keys.saturating_mul(13).saturating_add(tensors.saturating_mul(24));
    if least > header.left() {
        return Err(LoadError::Broken(format!(
            "it announces {keys} metadata keys and {tensors} tensors, more than fit in its {} bytes",
            file.len()
        )));
    }
    check_keys(&mut header, keys)?;
    check_tensors(&mut header, tensors)?;
    if header.at > HEADER_BYTES_MAX {
        return Err(LoadError::Broken(format!(
            "its header has {} bytes, more than {HEADER_BYTES_MAX}",
            header.at
        )));
    }
    Ok(())
}

fn check_keys(header: &mut Reader, keys: u64) -> Result<(), LoadError> {
    let mut seen = HashSet::new();
    for _ in 0..keys {
        let raw = header.string("a metadata key")?;
        let key = String::from_utf8_lossy(raw).into_owned();
        let value_type = header.u32(&key)?;
        if key == "general.alignment" {
            if value_type != TYPE_U32 {
                let found = format!("a value of type {value_type}");
                return Err(LoadError::KeyType { key, expected: "an unsigned 32-bit integer", found });
            }
            let alignment = header.u32(&key)?;
            if !alignment.is_power_of_two() {
                return Err(LoadError::key_value(
                    &key,
                    format!("{alignment} is no power of two; download or convert the model again"),
                ));
            }
        } else {
            header.skip_value(value_type, &key, 0)?;
        }
        if !seen.insert(raw) {
            return Err(LoadError::DuplicateKey(key));
        }
    }
    Ok(())
}

fn check_tensors(header: &mut Reader, tensors: u64) -> Result<(), LoadError> {
    let mut seen = HashSet::new();
    for _ in 0..tensors {
        let raw = header.string("a tensor's name")?;
        let name = String::from_utf8_lossy(raw).into_owned();
        let dimensions = header.u32(&name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(LoadError::Broken(format!(
                "tensor `{name}` has {dimensions} dimensions, more than {DIMENSIONS_MAX}"
            )));
        }
        for _ in 0..dimensions {
            header.u64(&name)?;
        }
        let dtype = header.u32(&name)?;
        if !matches!(dtype, 0..=3 | 6..=15 | 30) {
            return Err(LoadError::TensorType {
                tensor: name,
                dtype: type_name(dtype),
                supported: SUPPORTED_TYPES,
            });
        }
        header.u64(&name)?;
        if !seen.insert(raw) {
            return Err(LoadError::DuplicateTensor(name));
        }
    }
    Ok(())
}

/// The name of a tensor type that cannot be read (numbers from ggml's `enum ggml_type`).
fn type_name(dtype: u32) -> String {
    let name = match dtype {
        4 => "Q4_2",
        5 => "Q4_3",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return format!("number {dtype}"),
    };
    name.into()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Of the arrays so far.
    items: u64,
}

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `len` bytes; `what` names them should the file end before.
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], LoadError> {
        if len > self.left() {
            return Err(LoadError::Broken(format!(
                "{what} needs {len} bytes at byte {}, the file has {}",
                self.at,
                self.bytes.len()
            )));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        let low = u64::from(self.u32(what)?);
        Ok(u64::from(self.u32(what)?) << 32 | low)
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8], LoadError> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    fn skip_value(&mut self, value_type: u32, key: &str, depth: usize) -> Result<(), LoadError> {
        match value_type {
            TYPE_BOOL => {
                let byte = self.take(1, key)?[0];
                if byte > 1 {
                    return Err(LoadError::key_value(key, format!("a boolean has the value {byte}")));
                }
            }
            TYPE_STRING => drop(self.string(key)?),
            TYPE_ARRAY => self.skip_array(key, depth)?,
            scalar => drop(self.take(scalar_bytes(scalar, key)?, key)?),
        }
        Ok(())
    }

    fn skip_array(&mut self, key: &str, depth: usize) -> Result<(), LoadError> {
        if depth == ARRAY_DEPTH_MAX {
            return Err(LoadError::key_value(key, "arrays are nested too deep"));
        }
        let item_type = self.u32(key)?;
        let len = self.u64(key)?;
        match item_type {
            TYPE_BOOL | TYPE_STRING | TYPE_ARRAY => {
                // Every item takes a byte at least, so this loop ends with the file.
                for _ in 0..len {
                    self.skip_value(item_type, key, depth + 1)?;
                }
            }
            scalar => drop(self.take(len.saturating_mul(scalar_bytes(scalar, key)?), key)?),
        }
        // `len` items were there, so the sum is no more than the file's bytes.
        self.items += len;
        if self.items > ITEMS_MAX {
            let problem = format!("with its {len} items the header's arrays have more than {ITEMS_MAX}");
            return Err(LoadError::key_value(key, problem));
        }
        Ok(())
    }
}

fn scalar_bytes(value_type: u32, key: &str) -> Result<u64, LoadError> {
    match value_type {
        0 | 1 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        other => Err(LoadError::key_value(key, format!("unknown value type {other}"))),
    }
}
