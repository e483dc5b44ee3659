//! Which files of a repository make a model: one GGUF file, or safetensors with what belongs to them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::listing::Listed;
use crate::catalog::{HubId, is_plain_path};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Taken along where they exist: what loading reads, or names when it refuses.
const COMPANIONS: &[&str] = &[
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "quantize_config.json",
    "quant_config.json",
];
/// An index is read whole.
const INDEX_MAX: u64 = 64 << 20;
/// Files that an error lists.
const SHOWN_MAX: usize = 40;

/// Why a repository gives no model that can be served.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unsuitable {
    /// More than one GGUF file, and none was named.
    #[error("it has {} GGUF files; name one:\n{}\nfor example: obol serve --model {example}", files.len(), shown(files))]
    Several {
        /// `owner/name:file` and size, of each.
        files: Vec<String>,
        /// One of them.
        example: String,
    },
    /// The named file is not there.
    #[error("it has no file '{file}'; {}", others(files))]
    NoSuchFile {
        /// The wanted path.
        file: String,
        /// `owner/name:file` and size of the GGUF files that it has.
        files: Vec<String>,
    },
    /// The named file is no GGUF file.
    #[error(
        "'{0}' is no GGUF file; to serve safetensors leave out the file: they are fetched with all that belongs to them"
    )]
    NotGguf(String),
    /// A model cut into several GGUF files.
    #[error(
        "'{0}' is one part of a model that is split over several GGUF files, which cannot be served yet; choose a file \
         in one piece, or fetch the parts, join them with llama.cpp's `llama-gguf-split --merge`, and give the path"
    )]
    Split(String),
    /// Weights in formats that can run code when read.
    #[error(
        "its weights are only in {0}; safetensors (model.safetensors, with a config.json) or GGUF are needed"
    )]
    Pickled(String),
    /// Safetensors, but not as a model has them.
    #[error(
        "it has safetensors but no {0}, so it is no whole model (an adapter, perhaps, or another kind of model)"
    )]
    Incomplete(&'static str),
    /// The index of the shards does not fit the repository.
    #[error("its {INDEX} cannot be used: {0}")]
    Index(String),
    /// No weights at all.
    #[error("it has no weights: neither *.safetensors nor *.gguf")]
    NoWeights,
}

fn shown(files: &[String]) -> String {
    let mut lines: Vec<String> = files.iter().take(SHOWN_MAX).map(|file| format!("  {file}")).collect();
    if files.len() > SHOWN_MAX {
        lines.push(format!("  and {} more", files.len() - SHOWN_MAX));
    }
    lines.join("\n")
}

fn others(files: &[String]) -> String {
    match files.is_empty() {
        true => "and no GGUF file at all".to_owned(),
        false => format!("it has:\n{}", shown(files)),
    }
}

/// The files of a model.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// One GGUF file.
    Gguf(Listed),
    /// One file of weights, and its companions.
    Single(Vec<Listed>),
    /// Shards: the index has to be read to know which, and goes with the companions.
    Sharded { index: Listed, companions: Vec<Listed> },
}

/// Chooses from all files of a repository.
pub(super) fn select(id: &HubId, listing: &[Listed]) -> Result<Selection, Unsuitable> {
    let find = |path: &str| listing.iter().find(|file| file.path == path).cloned();
    let ggufs: Vec<&Listed> = listing.iter().filter(|file| is_model_gguf(&file.path)).collect();
    if let Some(wanted) = id.file() {
        return match find(wanted) {
            Some(_) if is_split(wanted) => Err(Unsuitable::Split(wanted.to_owned())),
            Some(file) if wanted.ends_with(".gguf") => Ok(Selection::Gguf(file)),
            Some(_) => Err(Unsuitable::NotGguf(wanted.to_owned())),
            None => Err(Unsuitable::NoSuchFile { file: wanted.to_owned(), files: named(id, &ggufs) }),
        };
    }
    let companions = || COMPANIONS.iter().filter_map(|path| find(path)).collect::<Vec<_>>();
    match (find(CONFIG), find(SINGLE), find(INDEX)) {
        (Some(_), Some(weights), _) => {
            return Ok(Selection::Single(companions().into_iter().chain([weights]).collect()));
        }
        (Some(_), None, Some(index)) if index.bytes > INDEX_MAX => {
            return Err(Unsuitable::Index(format!("it has {}", size(index.bytes))));
        }
        (Some(_), None, Some(index)) => {
            return Ok(Selection::Sharded { index, companions: companions() });
        }
        _ => {}
    }
    let whole: Vec<&Listed> = ggufs.iter().copied().filter(|file| !is_split(&file.path)).collect();
    let has = |ending: &str| listing.iter().any(|file| file.path.ends_with(ending));
    match (whole.as_slice(), ggufs.first()) {
        ([one], _) => Ok(Selection::Gguf((*one).clone())),
        ([first, ..], _) => {
            let usual = whole.iter().find(|file| file.path.to_ascii_uppercase().contains("Q4_K_M"));
            let example = format!("{}:{}", id.repository(), usual.unwrap_or(first).path);
            Err(Unsuitable::Several { files: named(id, &whole), example })
        }
        ([], Some(part)) => Err(Unsuitable::Split(part.path.clone())),
        ([], None) if has(".safetensors") => {
            let whole = find(SINGLE).is_some() || find(INDEX).is_some();
            Err(Unsuitable::Incomplete(if whole { CONFIG } else { "model.safetensors" }))
        }
        ([], None) => {
            let pickled = [".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx"];
            let found: Vec<&str> = pickled.into_iter().filter(|ending| has(ending)).collect();
            Err(match found.is_empty() {
                true => Unsuitable::NoWeights,
                false => Unsuitable::Pickled(found.join(", ")),
            })
        }
    }
}

/// The shards that an index names, as the repository has them.
pub(super) fn shards(index: &[u8], listing: &[Listed]) -> Result<Vec<Listed>, Unsuitable> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| Unsuitable::Index(error.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.is_empty() {
        return Err(Unsuitable::Index("it names no file".to_owned()));
    }
    let shard = |name: &String| {
        let plain = is_plain_path(name) && !name.contains('/') && name.ends_with(".safetensors");
        let listed = listing.iter().find(|file| plain && file.path == *name);
        listed.cloned().ok_or_else(|| Unsuitable::Index(format!("it names {name:?}, which is not there")))
    };
    names.into_iter().map(shard).collect()
}

/// Projectors of multimodal models are no models.
fn is_model_gguf(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.ends_with(".gguf") && !name.to_ascii_lowercase().starts_with("mmproj")
}

/// `NAME-00001-of-00003.gguf`; of 00001 is whole.
fn is_split(path: &str) -> bool {
    let part = |path: &str| {
        let (rest, of) = path.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        let (_, number) = rest.rsplit_once('-')?;
        Some(digits(of) && digits(number) && of != "00001")
    };
    part(path).unwrap_or(false)
}

fn named(id: &HubId, files: &[&Listed]) -> Vec<String> {
    let part = |path: &str| if is_split(path) { ", one part of a split file" } else { "" };
    let line = |file: &&Listed| {
        format!("{}:{}  ({}{})", id.repository(), file.path, size(file.bytes), part(&file.path))
    };
    files.iter().map(line).collect()
}

/// For people: 3 digits and a unit.
pub(super) fn size(bytes: u64) -> String {
    let units = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match units.into_iter().find(|(_, unit)| bytes as f64 >= *unit) {
        Some((name, unit)) => {
            let value = bytes as f64 / unit;
            format!("{value:.*} {name}", usize::from(value < 100.0))
        }
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::Checksum;

    /// `select` on files written as one line, described in one line.
    fn check(id: &str, files: &str, expected: &str) {
        let listing: Vec<Listed> = files.split_whitespace().map(listed).collect();
        let id = HubId::parse(id).expect("an id").expect("a good id");
        let paths =
            |files: &[Listed]| files.iter().map(|file| file.path.clone()).collect::<Vec<_>>().join(" ");
        let found = match select(&id, &listing) {
            Ok(Selection::Gguf(file)) => format!("gguf {}", file.path),
            Ok(Selection::Single(files)) => format!("single {}", paths(&files)),
            Ok(Selection::Sharded { companions, .. }) => format!("sharded {}", paths(&companions)),
            Err(error) => format!("error {error}"),
        };
        match expected.strip_prefix("error ") {
            Some(parts) => {
                for part in parts.split(" & ") {
                    assert!(
                        found.starts_with("error ") && found.contains(part),
                        "'{part}' is not in: {found}"
                    );
                }
            }
            None => assert_eq!(found, expected, "{id} of {files}"),
        }
    }

    fn listed(path: &str) -> Listed {
        let bytes = if path.ends_with(".json") { 1000 } else { 1_230_000_000 };
        Listed { path: path.to_owned(), bytes, checksum: Checksum::Sha256("0".repeat(64)) }
    }

    #[test]
    fn safetensors_come_with_their_companions_and_nothing_else() {
        check(
            "a/b",
            "README.md added_tokens.json config.json consolidated.safetensors merges.txt model.safetensors onnx/model.onnx \
             original/tokenizer.json pytorch_model.bin tokenizer.json vocab.json x.gguf",
            "single config.json tokenizer.json added_tokens.json vocab.json merges.txt model.safetensors",
        );
        check(
            "a/b",
            "config.json model.safetensors model.safetensors.index.json",
            "single config.json model.safetensors",
        );
        check(
            "a/b",
            "chat_template.jinja config.json model-00001-of-00002.safetensors model.safetensors.index.json",
            "sharded config.json chat_template.jinja",
        );
    }

    #[test]
    fn one_gguf_file_is_found_and_several_are_listed() {
        check("a/b", "README.md config.json x.gguf mmproj-x.gguf", "gguf x.gguf");
        check("a/b", "big/x-00001-of-00002.gguf big/x-00002-of-00002.gguf x.Q4_0.gguf", "gguf x.Q4_0.gguf");
        check(
            "a/b",
            "x.Q2_K.gguf x.q4_k_m.gguf",
            "error 2 GGUF files & a/b:x.Q2_K.gguf  (1.2 GB) & obol serve --model a/b:x.q4_k_m.gguf",
        );
        check("a/b:y.gguf", "x.gguf y.gguf", "gguf y.gguf");
        check("a/b:y.gguf", "x.gguf", "error no file 'y.gguf' & a/b:x.gguf  (1.2 GB)");
        check("a/b:y.gguf", "config.json", "error no GGUF file at all");
        check("a/b:config.json", "config.json", "error no GGUF file & leave out the file");
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        check("a/b:x-00001-of-00002.gguf", "x-00001-of-00002.gguf", "error split over several & --merge");
        check("a/b:x-00001-of-00001.gguf", "x-00001-of-00001.gguf", "gguf x-00001-of-00001.gguf");
        check("a/b", "x-00001-of-00002.gguf x-00002-of-00002.gguf", "error split over several");
        check("a/b", "config.json pytorch_model.bin", "error only in .bin & safetensors");
        check("a/b", "consolidated.00.pth params.json", "error only in .pth");
        check("a/b", "adapter_model.safetensors", "error no model.safetensors");
        check("a/b", "model.safetensors", "error no config.json");
        check("a/b", "README.md", "error no weights");
        check("a/b", "", "error no weights");
    }

    #[test]
    fn an_index_names_files_of_the_repository() {
        let listing = [listed("model-1.safetensors"), listed("model-2.safetensors"), listed("evil.bin")];
        let of = |text: &str| shards(text.as_bytes(), &listing).map(|files| files.len());
        assert_eq!(
            of(r#"{"metadata": {"total_size": 1},
                  "weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}"#),
            Ok(2)
        );
        for text in [
            "",
            "[]",
            r#"{"weight_map": {}}"#,
            r#"{"weight_map": {"a": "model-3.safetensors"}}"#,
            r#"{"weight_map": {"a": "../model-1.safetensors"}}"#,
            r#"{"weight_map": {"a": "evil.bin"}}"#,
        ] {
            assert!(matches!(of(text), Err(Unsuitable::Index(_))), "{text}");
        }
    }
}
