//! GGUF files: a memory map, typed metadata, and the checked bytes of each tensor.
//!
//! Knows the file format and nothing of what a model does with it. Invariants: after `open` every tensor's
//! bytes lie inside the file, and no input makes this module panic or ask for more memory than a small
//! multiple of the header's size. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use memmap2::{Mmap, UncheckedAdvice};

use crate::checkpoint::Tensors;
use crate::error::LoadError;
use crate::gguf_check;

/// The tensor types that can be computed with.
pub(crate) const SUPPORTED_TYPES: &str =
    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

/// An open GGUF file.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    content: Content,
    data_start: usize,
}

/// A tensor as it lies in the file.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    pub name: String,
    pub dtype: GgmlDType,
    /// Outermost dimension first, so a weight is (out_features, in_features).
    pub shape: Vec<usize>,
    /// Blocks of `dtype`, row after row; not aligned.
    pub data: &'a [u8],
}

impl GgufFile {
    /// Maps the file, reads its header and checks that every tensor lies inside the file.
    ///
    /// # Errors
    /// When the file cannot be read, is no GGUF file of version 2 or 3, or its header is inconsistent.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // An empty file cannot be mapped; a directory gives the system's own message.
        if file.metadata().map_err(io)?.len() == 0 {
            return Err(LoadError::NotGguf("the file is empty; download it again".into()));
        }
        // SAFETY: the map is read-only and private to this value. Model files are not written to while
        // in use: the fetcher renames finished files into place and never edits one.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        gguf_check::check_header(&map)?;
        let content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|error| LoadError::Broken(error.to_string().lines().next().unwrap_or("").into()))?;
        let data_start = usize::try_from(content.tensor_data_offset)
            .map_err(|_| LoadError::Broken("the header is too long".into()))?;
        let opened = Self { path: path.into(), map, content, data_start };
        opened.refuse_split()?;
        // In the order of the file, so that one file gives one message.
        let mut tensors: Vec<_> = opened.content.tensor_infos.iter().collect();
        tensors.sort_unstable_by_key(|&(name, info)| (info.offset, name));
        for (name, _) in tensors {
            opened.tensor(name)?;
        }
        Ok(opened)
    }

    /// Refuses a file that holds a part of a model.
    fn refuse_split(&self) -> Result<(), LoadError> {
        let Some(parts) = self.find_u32("split.count")?.filter(|&parts| parts > 1) else { return Ok(()) };
        let part = self.find_u32("split.no")?.unwrap_or(0).saturating_add(1);
        Err(LoadError::UnsupportedGguf(format!(
            "it is part {part} of a model split into {parts} files (`split.count`); merge them into one with \
             llama.cpp's `llama-gguf-split --merge FIRST_PART MERGED`"
        )))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// The header with all metadata and the tensor table, as it lies in the file.
    pub fn header(&self) -> &[u8] {
        &self.map[..self.data_start.min(self.map.len())]
    }

    /// Names of all tensors, in no order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none, or it does not lie inside the file.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let info =
            self.content.tensor_infos.get(name).ok_or_else(|| LoadError::MissingTensor(name.into()))?;
        let problem = |problem: String| LoadError::TensorData { tensor: name.into(), problem };
        let shape = info.shape.dims().to_vec();
        let block = info.ggml_dtype.block_size();
        let row = shape.last().copied().unwrap_or(1);
        if shape.contains(&0) || row % block != 0 {
            return Err(problem(format!(
                "shape {shape:?} does not fit type {:?}: rows are whole blocks of {block} values; \
                 download or convert the model again",
                info.ggml_dtype
            )));
        }
        let range = shape
            .iter()
            .try_fold(1usize, |product, &dim| product.checked_mul(dim))
            .and_then(|elements| (elements / block).checked_mul(info.ggml_dtype.type_size()))
            .and_then(|bytes| {
                let start = usize::try_from(info.offset).ok()?.checked_add(self.data_start)?;
                Some(start..start.checked_add(bytes)?)
            })
            .ok_or_else(|| {
                problem(format!(
                    "its shape {shape:?} or its offset {} is absurd; download or convert the model again",
                    info.offset
                ))
            })?;
        let data = self.map.get(range.clone()).ok_or_else(|| {
            LoadError::Broken(format!(
                "tensor `{name}` ends at byte {} but the file has {}",
                range.end,
                self.map.len()
            ))
        })?;
        Ok(TensorView { name: name.into(), dtype: info.ggml_dtype, shape, data })
    }

    /// A small F32, F16 or BF16 tensor (a norm's weight, a bias) as f32.
    ///
    /// # Errors
    /// When there is none, it has another shape or a quantised type.
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name)?;
        tensor.expect_shape(shape)?;
        tensor.to_f32()
    }

    // ---- metadata: `find_x` is None where the key is absent, `x` is an error then ----

    /// The value of `key` as the reader holds it.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// `general.architecture`.
    ///
    /// # Errors
    /// When it is missing or no string.
    pub fn architecture(&self) -> Result<&str, LoadError> {
        self.string("general.architecture")
    }

    /// A string.
    ///
    /// # Errors
    /// When `key` is missing or holds something else.
    pub fn string(&self, key: &str) -> Result<&str, LoadError> {
        required(key, self.find_string(key)?)
    }

    /// A string, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        self.find(key, "a string", as_str)
    }

    /// An integer of any width that fits.
    ///
    /// # Errors
    /// When `key` is missing or holds something else.
    pub fn u32(&self, key: &str) -> Result<u32, LoadError> {
        required(key, self.find_u32(key)?)
    }

    /// An integer of any width that fits, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_u32(&self, key: &str) -> Result<Option<u32>, LoadError> {
        self.find(key, "an unsigned 32-bit integer", |value| as_i64(value)?.try_into().ok())
    }

    /// A float of 32 or 64 bits, rounded to 32.
    ///
    /// # Errors
    /// When `key` is missing or holds something else.
    pub fn f32(&self, key: &str) -> Result<f32, LoadError> {
        required(key, self.find_f32(key)?)
    }

    /// A float of 32 or 64 bits, rounded to 32, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        self.find(key, "a float", as_f32)
    }

    /// A boolean, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.find(key, "a boolean", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// When `key` is missing or holds something else.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, LoadError> {
        required(key, self.find_strings(key)?)
    }

    /// An array of strings, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_strings(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        self.find(key, "an array of strings", |value| as_array(value, as_str))
    }

    /// An array of floats, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_f32s(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        self.find(key, "an array of floats", |value| as_array(value, as_f32))
    }

    /// An array of integers of any width that fit, if there.
    ///
    /// # Errors
    /// When `key` holds something else.
    pub fn find_i32s(&self, key: &str) -> Result<Option<Vec<i32>>, LoadError> {
        self.find(key, "an array of 32-bit integers", |value| {
            as_array(value, |item| as_i64(item)?.try_into().ok())
        })
    }

    fn find<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(LoadError::KeyType { key: key.into(), expected, found: describe(value) }),
        }
    }
}

impl Tensors for GgufFile {
    fn find(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        if self.has_tensor(name) { self.tensor(name).map(Some) } else { Ok(None) }
    }

    fn names(&self) -> Vec<&str> {
        self.tensor_names().collect()
    }

    fn forget(&self, data: &[u8]) {
        forget_pages(&self.map, data);
    }
}

/// Lets the system take back the pages that lie whole inside `data`, a part of `map`.
pub(crate) fn forget_pages(map: &Mmap, data: &[u8]) {
    /// At least every system's page size, so that a page is either inside or left alone.
    const PAGE: usize = 1 << 16;
    let Some(start) = (data.as_ptr() as usize).checked_sub(map.as_ptr() as usize) else { return };
    let end = (start + data.len()).min(map.len()) / PAGE * PAGE;
    let start = start.next_multiple_of(PAGE);
    if start < end {
        // SAFETY: the map is of a file and read-only: a page that is dropped is read from the file again
        // when it is touched. A refusal costs memory only.
        drop(unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) });
    }
}

impl TensorView<'_> {
    /// # Errors
    /// When the tensor has another shape.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), LoadError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(LoadError::TensorShape {
            tensor: self.name.clone(),
            expected: expected.into(),
            found: self.shape.clone(),
        })
    }
}

/// A tensor type's name as GGUF tools write it.
pub fn type_name(dtype: GgmlDType) -> String {
    match dtype {
        GgmlDType::Q2K => "Q2_K".into(),
        GgmlDType::Q3K => "Q3_K".into(),
        GgmlDType::Q4K => "Q4_K".into(),
        GgmlDType::Q5K => "Q5_K".into(),
        GgmlDType::Q6K => "Q6_K".into(),
        GgmlDType::Q8K => "Q8_K".into(),
        other => format!("{other:?}"),
    }
}

fn required<T>(key: &str, found: Option<T>) -> Result<T, LoadError> {
    found.ok_or_else(|| LoadError::MissingKey(key.into()))
}

fn as_str(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn as_f32(value: &Value) -> Option<f32> {
    match value {
        Value::F32(x) => Some(*x),
        Value::F64(x) => Some(*x as f32),
        _ => None,
    }
}

fn as_i64(value: &Value) -> Option<i64> {
    Some(match value {
        Value::U8(x) => (*x).into(),
        Value::I8(x) => (*x).into(),
        Value::U16(x) => (*x).into(),
        Value::I16(x) => (*x).into(),
        Value::U32(x) => (*x).into(),
        Value::I32(x) => (*x).into(),
        Value::U64(x) => i64::try_from(*x).ok()?,
        Value::I64(x) => *x,
        _ => return None,
    })
}

fn as_array<'a, T>(value: &'a Value, item: impl FnMut(&'a Value) -> Option<T>) -> Option<Vec<T>> {
    match value {
        Value::Array(items) => items.iter().map(item).collect(),
        _ => None,
    }
}

/// A short text of a value for an error: never a whole vocabulary.
fn describe(value: &Value) -> String {
    match value {
        Value::Array(items) => match items.first() {
            Some(first) => format!("an array of {} values of type {:?}", items.len(), first.value_type()),
            None => "an empty array".into(),
        },
        Value::String(text) => format!("the string {:?}", text.chars().take(40).collect::<String>()),
        other => format!("{other:?}"),
    }
}
