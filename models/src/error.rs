//! What can be wrong with a model's files. The one error type of everything that loads.

use std::path::PathBuf;

/// Why a model could not be loaded. Messages name the key or tensor; the caller adds the file's name.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0}")]
    Device(String),

    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("not a GGUF file: {0}")]
    NotGguf(String),

    #[error(
        "GGUF version {0} is not supported (versions 2 and 3 are); convert the model again, or download another \
         file of it"
    )]
    Version(u32),

    #[error("the GGUF file is not supported: {0}")]
    UnsupportedGguf(String),

    #[error("the GGUF file is broken or incomplete: {0}; download it again")]
    Broken(String),

    #[error("{} has no {missing}", directory.display())]
    Directory { directory: PathBuf, missing: String },

    #[error("{}: the safetensors file is broken or incomplete: {problem}; download it again", file.display())]
    BrokenSafetensors { file: PathBuf, problem: String },

    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: String },

    #[error("GGUF metadata has no key `{0}`, which is needed; download or convert the model again")]
    MissingKey(String),

    #[error(
        "GGUF metadata key `{key}` should hold {expected} but holds {found}; download or convert the model again"
    )]
    KeyType { key: String, expected: &'static str, found: String },

    #[error("GGUF metadata key `{key}`: {problem}")]
    KeyValue { key: String, problem: String },

    #[error("{}: no key `{key}`, which is needed; download the file again", file.display())]
    MissingConfigKey { file: PathBuf, key: String },

    #[error(
        "{}: key `{key}` should hold {expected} but holds {found}; correct it or download the file again",
        file.display()
    )]
    ConfigType { file: PathBuf, key: String, expected: &'static str, found: String },

    #[error("{}: key `{key}`: {problem}", file.display())]
    ConfigValue { file: PathBuf, key: String, problem: String },

    #[error("GGUF metadata key `{0}` occurs twice; download or convert the model again")]
    DuplicateKey(String),

    #[error("tensor `{0}` occurs twice; download or convert the model again")]
    DuplicateTensor(String),

    #[error("there is no tensor `{0}`, which the model needs; the files are incomplete or not of one model")]
    MissingTensor(String),

    #[error(
        "tensor `{tensor}` should have the shape {expected:?} but has {found:?}; the weights and the configuration \
         are not of one model"
    )]
    TensorShape { tensor: String, expected: Vec<usize>, found: Vec<usize> },

    #[error("tensor `{tensor}` has the type {dtype}, which is not supported here; supported: {supported}")]
    TensorType { tensor: String, dtype: String, supported: &'static str },

    #[error("tensor `{tensor}`: {problem}")]
    TensorData { tensor: String, problem: String },

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
