//! What can be wrong with a model's files. The one error type of everything that loads.

use std::path::PathBuf;

/// Why a model could not be loaded. Messages name the key or tensor; the caller adds the file's name.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("not a GGUF file: it begins with {found:?}, not \"GGUF\"")]
    NotGguf { found: String },

    #[error("GGUF version {0} is not supported (versions 2 and 3 are)")]
    Version(u32),

    #[error("the GGUF file is broken or incomplete: {0}; download it again")]
    Broken(String),

    #[error(
        "{} has no weights: neither model.safetensors nor model.safetensors.index.json is there",
        directory.display()
    )]
    NoWeights { directory: PathBuf },

    #[error("{}: the safetensors file is broken or incomplete: {problem}; download it again", file.display())]
    BrokenSafetensors { file: PathBuf, problem: String },

    #[error("{}: {problem}", file.display())]
    JsonFile { file: PathBuf, problem: String },

    #[error("GGUF metadata has no key `{0}`")]
    MissingKey(String),

    #[error("GGUF metadata key `{key}` should hold {expected} but holds {found}")]
    KeyType { key: String, expected: &'static str, found: String },

    #[error("GGUF metadata key `{key}`: {problem}")]
    KeyValue { key: String, problem: String },

    #[error("{}: no key `{key}`", file.display())]
    MissingConfigKey { file: PathBuf, key: String },

    #[error("{}: key `{key}` should hold {expected} but holds {found}", file.display())]
    ConfigType { file: PathBuf, key: String, expected: &'static str, found: String },

    #[error("{}: key `{key}`: {problem}", file.display())]
    ConfigValue { file: PathBuf, key: String, problem: String },

    #[error("GGUF metadata key `{0}` occurs twice")]
    DuplicateKey(String),

    #[error("tensor `{0}` occurs twice")]
    DuplicateTensor(String),

    #[error("the file has no tensor `{0}`")]
    MissingTensor(String),

    #[error("tensor `{tensor}` should have the shape {expected:?} but has {found:?}")]
    TensorShape { tensor: String, expected: Vec<usize>, found: Vec<usize> },

    #[error("tensor `{tensor}` has the type {dtype}, which is not supported here; supported: {supported}")]
    TensorType { tensor: String, dtype: String, supported: &'static str },

    #[error("tensor `{tensor}`: {problem}")]
    TensorData { tensor: String, problem: String },

    #[error("architecture `{found}` is not supported; supported: {supported}")]
    Architecture { found: String, supported: String },

    #[error("the model's tokenizer cannot be used: {0}")]
    Tokenizer(String),

    #[error("the model's chat template cannot be used: {0}")]
    Template(String),

    #[error("{0}")]
    Options(String),

    #[error("not enough memory: {0}")]
    Memory(String),
}

impl LoadError {
    /// A value that has the right type but makes no sense.
    pub fn key_value(key: &str, problem: impl Into<String>) -> Self {
        Self::KeyValue { key: key.into(), problem: problem.into() }
    }
}
