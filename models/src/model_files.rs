//! A model's files, open: a GGUF file, or a directory as Hugging Face has them.
//!
//! Knows which files make a model, and puts each format's spec and names together; knows no weights' values
//! but to compare two heads.

use std::path::{Path, PathBuf};

use crate::checkpoint::{Checkpoint, Tensors};
use crate::error::LoadError;
use crate::gguf::{GgufFile, type_name};
use crate::names::{Gguf, HuggingFace};
use crate::safetensors::Safetensors;
use crate::spec::ModelSpec;
use crate::spec::config::Config;
use crate::text_files::{self, Text};

/// Files that hold one model.
pub enum ModelFiles {
    Gguf(GgufFile),
    Directory(Directory),
}

/// config.json and safetensors.
pub struct Directory {
    path: PathBuf,
    config: Config,
    weights: Safetensors,
}

impl ModelFiles {
    /// Opens the GGUF file or the directory at `path`.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if !path.is_dir() {
            return GgufFile::open(path).map(Self::Gguf);
        }
        let config = Config::open(path)?;
        let weights = Safetensors::open(path)?;
        Ok(Self::Directory(Directory { path: path.into(), config, weights }))
    }

    /// What the model is.
    ///
    /// # Errors
    /// When it is not supported, or the files contradict themselves.
    pub fn spec(&self) -> Result<ModelSpec, LoadError> {
        match self {
            Self::Gguf(file) => ModelSpec::from_gguf(file),
            Self::Directory(directory) => directory.config.spec(),
        }
    }

    /// The tensors under the decoder's names.
    ///
    /// # Errors
    /// When the head's tensors contradict the spec.
    pub(crate) fn checkpoint(&self, spec: &ModelSpec) -> Result<Checkpoint<'_>, LoadError> {
        match self {
            Self::Gguf(file) => Ok(Checkpoint::new(file, Gguf::new(file, spec))),
            Self::Directory(directory) => {
                let names = HuggingFace::new(&directory.weights, directory.config.family(), spec);
                let grouped = directory.config.grouped()?;
                let checkpoint = Checkpoint::new(&directory.weights, names).with_grouped(grouped);
                if spec.tied_head {
                    checkpoint.expect_equal("token_embd.weight", "output.weight")?;
                }
                Ok(checkpoint)
            }
        }
    }

    /// The tokenizer and the chat template.
    ///
    /// # Errors
    /// As [`text_files::from_gguf`] and [`text_files::from_directory`].
    pub(crate) fn text(&self) -> Result<Text, LoadError> {
        match self {
            Self::Gguf(file) => text_files::from_gguf(file),
            Self::Directory(directory) => text_files::from_directory(&directory.path),
        }
    }

    fn tensors(&self) -> &dyn Tensors {
        match self {
            Self::Gguf(file) => file,
            Self::Directory(directory) => &directory.weights,
        }
    }

    /// What the files call the model, else what they are called.
    ///
    /// # Errors
    /// When the name is no text.
    pub fn name(&self) -> Result<String, LoadError> {
        let (stated, called) = match self {
            Self::Gguf(file) => (file.find_string("general.name")?, file.path().file_stem()),
            Self::Directory(directory) => (directory.config.name(), directory.path.file_name()),
        };
        let stated = stated.map(str::trim).filter(|name| !name.is_empty());
        let called = called.map(|name| name.to_string_lossy().into_owned());
        Ok(stated.map(String::from).or(called).unwrap_or_else(|| "model".into()))
    }

    /// The type with the most bytes among the matrices.
    ///
    /// # Errors
    /// When a tensor's type cannot be read.
    pub fn precision(&self) -> Result<String, LoadError> {
        if let Self::Directory(directory) = self
            && let Some(grouped) = directory.config.grouped()?
        {
            return Ok(grouped.label().into());
        }
        let mut bytes_by_type: Vec<(String, usize)> = Vec::new();
        let tensors = self.tensors();
        // GGUF's embedding and head often have another type than the layers.
        let in_layer = |name: &&str| match self {
            Self::Gguf(_) => name.starts_with("blk."),
            Self::Directory(_) => true,
        };
        for name in tensors.names().into_iter().filter(in_layer) {
            let Some(tensor) = tensors.find(name)? else { continue };
            let dtype = type_name(tensor.dtype);
            match bytes_by_type.iter_mut().find(|(known, _)| *known == dtype) {
                Some((_, bytes)) => *bytes += tensor.data.len(),
                None => bytes_by_type.push((dtype, tensor.data.len())),
            }
        }
        let most = bytes_by_type.into_iter().max_by(|a, b| a.1.cmp(&b.1).then_with(|| b.0.cmp(&a.0)));
        Ok(most.map_or_else(|| "F32".into(), |(dtype, _)| dtype))
    }

    /// blake3, in hex, of the headers, the tensor tables, the configuration and the files' length: tells
    /// models apart without reading all their weights.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::Gguf(file) => {
                hasher.update(file.header());
                hasher.update(&file.file_bytes().to_le_bytes());
            }
            Self::Directory(directory) => {
                for header in directory.weights.headers() {
                    hasher.update(header);
                }
                hasher.update(directory.config.bytes());
                hasher.update(&directory.weights.file_bytes().to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}
