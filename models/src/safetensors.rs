//! Safetensors checkpoints: one file, or the shards that `model.safetensors.index.json` names.
//!
//! Knows the file format and nothing of what a model does with it. Invariants: after `open` every tensor's
//! bytes lie inside its file, and no tensor is in two shards. The format is that of the crate `safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::checkpoint::Tensors;
use crate::error::LoadError;
use crate::gguf::{TensorView, forget_pages};
use crate::gptq::Integers;
use crate::text_files::file_names;
use crate::{foreign, safetensors_check};

/// The file that names the shards.
pub const INDEX: &str = "model.safetensors.index.json";
/// The file of a checkpoint without shards.
pub const SINGLE: &str = "model.safetensors";

/// An open checkpoint.
pub struct Safetensors {
    shards: Vec<Shard>,
    /// Which shard has a tensor.
    shard_of: HashMap<String, usize>,
}

struct Shard {
    file: PathBuf,
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

/// A tensor of any type as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

impl Safetensors {
    /// Opens the checkpoint in `directory`.
    ///
    /// # Errors
    /// When there is none, a shard is missing, or a file is broken.
    pub fn open(directory: &Path) -> Result<Self, LoadError> {
        let (index, single) = (directory.join(INDEX), directory.join(SINGLE));
        if index.is_file() {
            return Self::open_sharded(directory, &index);
        }
        if single.is_file() {
            return Self::from_shards(vec![Shard::open(&single)?]);
        }
        Err(no_weights(directory))
    }

    fn open_sharded(directory: &Path, index: &Path) -> Result<Self, LoadError> {
        let broken = |problem: String| LoadError::File { file: index.into(), problem };
        let text = std::fs::read(index).map_err(|source| LoadError::Io { path: index.into(), source })?;
        let parsed: Index = serde_json::from_slice(&text)
            .map_err(|error| broken(format!("it is no index: {error}; download it again")))?;
        let names: BTreeSet<&String> = parsed.weight_map.values().collect();
        let mut shards = Vec::new();
        for name in names {
            // Names come from outside: only files of this directory are opened.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(broken(format!(
                    "names `{name}`, which is no file of this directory; download it again"
                )));
            }
            let path = directory.join(name);
            if !path.is_file() {
                return Err(broken(format!("names {name}, which is not there; download it")));
            }
            shards.push(Shard::open(&path)?);
        }
        let opened = Self::from_shards(shards)?;
        for (tensor, file) in &parsed.weight_map {
            let found = opened.shard_of.get(tensor).map(|&shard| &opened.shards[shard].file);
            if found.and_then(|found| found.file_name()) != Some(file.as_ref()) {
                return Err(broken(format!(
                    "says that tensor `{tensor}` is in {file}, which does not have it; download both again"
                )));
            }
        }
        Ok(opened)
    }

    fn from_shards(shards: Vec<Shard>) -> Result<Self, LoadError> {
        let mut shard_of = HashMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.metadata.tensors().into_keys() {
                if let Some(other) = shard_of.insert(name.clone(), index) {
                    let other = shards[other].file.file_name().unwrap_or_default().display();
                    let problem =
                        format!("tensor `{name}` is in {other}, too; the files are not of one model");
                    return Err(LoadError::File { file: shard.file.clone(), problem });
                }
            }
        }
        Ok(Self { shards, shard_of })
    }

    /// The tensor `name`, of whatever type.
    pub fn find_raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let shard = &self.shards[*self.shard_of.get(name)?];
        let info = shard.metadata.info(name)?;
        Some(RawTensor { dtype: info.dtype, shape: &info.shape, data: shard.data(info) })
    }

    /// Bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.map.len() as u64).sum()
    }

    /// The files' headers, in the order of their names.
    pub fn headers(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().map(|shard| &shard.map[..shard.data_start])
    }
}

impl Tensors for Safetensors {
    fn find(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        let Some(raw) = self.find_raw(name) else { return Ok(None) };
        let dtype = match raw.dtype {
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            other => {
                return Err(LoadError::TensorType {
                    tensor: name.into(),
                    dtype: format!("{other:?}"),
                    supported: "F32, F16, BF16",
                });
            }
        };
        if raw.shape.contains(&0) {
            let problem = format!("its shape is {:?}", raw.shape);
            return Err(LoadError::TensorData { tensor: name.into(), problem });
        }
        Ok(Some(TensorView { name: name.into(), dtype, shape: raw.shape.to_vec(), data: raw.data }))
    }

    fn find_integers(&self, name: &str) -> Result<Option<Integers<'_>>, LoadError> {
        let Some(raw) = self.find_raw(name) else { return Ok(None) };
        if !matches!(raw.dtype, Dtype::I32 | Dtype::U32) {
            let (tensor, dtype) = (name.into(), format!("{:?}", raw.dtype));
            return Err(LoadError::TensorType { tensor, dtype, supported: "I32" });
        }
        Ok(Some(Integers { shape: raw.shape, data: raw.data }))
    }

    fn names(&self) -> Vec<&str> {
        self.shard_of.keys().map(String::as_str).collect()
    }

    fn forget(&self, data: &[u8]) {
        let inside = |shard: &&Shard| shard.map.as_ptr_range().contains(&data.as_ptr());
        if let Some(shard) = self.shards.iter().find(inside) {
            forget_pages(&shard.map, data);
        }
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let broken = |problem: String| LoadError::BrokenSafetensors { file: path.into(), problem };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.len() == 0 {
            return Err(broken("it is empty".into()));
        }
        // SAFETY: the map is read-only and private to this value. Model files are not written to while
        // in use: the fetcher renames finished files into place and never edits one.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let read = safetensors::SafeTensors::read_metadata(&map);
        let (header, metadata) = read.map_err(|error| match foreign::recognize(&map) {
            // Its own first bytes are like those of a whole file.
            Some(what) if map.get(8) != Some(&b'{') => {
                LoadError::File { file: path.into(), problem: what.into() }
            }
            _ => broken(safetensors_check::problem(&map, &error)),
        })?;
        // The header's length stands before it, in 8 bytes.
        Ok(Self { file: path.into(), map, data_start: header + 8, metadata })
    }

    fn data(&self, info: &TensorInfo) -> &[u8] {
        // The reader has checked that all offsets lie inside the file.
        &self.map[self.data_start + info.data_offsets.0..self.data_start + info.data_offsets.1]
    }
}

/// What is in a directory instead of weights.
fn no_weights(directory: &Path) -> LoadError {
    let names = file_names(directory);
    let found = |wanted: &dyn Fn(&str) -> bool| names.iter().find(|name| wanted(name));
    let is_pickle = |name: &str| {
        name.starts_with("pytorch_model") || [".pth", ".pt", ".ckpt"].iter().any(|end| name.ends_with(end))
    };
    let missing = if let Some(name) = found(&|name| name.ends_with(".safetensors")) {
        format!("{SINGLE}, but {name}, and no {INDEX} that names it; download the one that is missing")
    } else if let Some(name) = found(&is_pickle) {
        format!(
            "weights that can be read: {name} is there, but safetensors are needed; download those, or have \
             transformers write them (AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY))"
        )
    } else {
        format!("weights: neither {SINGLE} nor {INDEX} is there; download them")
    };
    LoadError::Directory { directory: directory.into(), missing }
}

/// `model.safetensors.index.json`.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}
