//! Spoils directories of config.json and safetensors: the JSON by its structure, the files' layout, and bytes.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use crate::random::{Random, WORDS};
use crate::{fixture, json};

const SEEDS: &[&str] = &[
    "awq_g128",
    "awq_g64",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gptq_g128",
    "gptq_g32_act_order",
    "gptq_v2_g64",
    "granite",
    "llama",
    "llama_biases",
    "llama_linear_rope",
    "llama_llama3_rope",
    "llama_sharded",
    "llama_sharded",
    "llama_yarn",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "phi3_longrope_long",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_dense_layers",
    "smollm3",
];
/// Bytes that a tensor is filled up to when its shape grows.
const DATA_MAX: usize = 1 << 20;

#[derive(Clone)]
struct Shard {
    file: String,
    header: Map<String, Value>,
    data: Vec<u8>,
}

#[derive(Clone)]
struct Model {
    seed: &'static str,
    config: Value,
    index: Option<Value>,
    shards: Vec<Shard>,
}

fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn parse(seed: &'static str) -> Model {
    let dir = fixture("families").join(seed);
    let mut names: Vec<String> = std::fs::read_dir(&dir)
        .expect("the fixture")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    names.sort();
    let shards = names.into_iter().map(|file| {
        let bytes = std::fs::read(dir.join(&file)).expect("a shard");
        let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + len]).expect("JSON");
        Shard { file, header, data: bytes[8 + len..].to_vec() }
    });
    Model {
        seed,
        config: read_json(&dir.join("config.json")).expect("a config.json"),
        index: read_json(&dir.join("model.safetensors.index.json")),
        shards: shards.collect(),
    }
}

fn models() -> &'static [Model] {
    static MODELS: OnceLock<Vec<Model>> = OnceLock::new();
    MODELS.get_or_init(|| SEEDS.iter().map(|seed| parse(seed)).collect())
}

/// Writes a spoiled model into a directory in `dir`.
pub(crate) fn spoil(random: &mut Random, dir: &Path, changes: &mut Vec<String>) -> PathBuf {
    let mut model = random.pick(models());
    let other = random.pick(models());
    changes.push(model.seed.into());
    let path = dir.join("model");
    drop(std::fs::remove_dir_all(&path));
    std::fs::create_dir(&path).expect("a temporary directory");
    let rounds = random.pick(&[0, 1, 1, 1, 2, 3]);
    for _ in 0..rounds {
        let shard = random.below(model.shards.len());
        let change = match random.below(20) {
            0..=7 => spoil_config(random, &mut model.config, &other.config),
            8..=9 => match &mut model.index {
                Some(index) => format!("index: {}", json::spoil(random, index)),
                None => {
                    model.index = Some(json!({ "weight_map": { "x": model.shards[0].file } }));
                    "an index added".into()
                }
            },
            10..=12 => {
                let mut header = Value::Object(std::mem::take(&mut model.shards[shard].header));
                let change = json::spoil(random, &mut header);
                if let Value::Object(header) = header {
                    model.shards[shard].header = header;
                }
                format!("header: {change}")
            }
            13 => {
                let from = random.pick(&other.shards);
                model.shards[shard].header = from.header;
                format!("{}'s header", other.seed)
            }
            14 if model.shards.len() > 1 => {
                let from = random.pick(&model.shards);
                model.shards[shard] = Shard { file: model.shards[shard].file.clone(), ..from };
                "a shard as another".into()
            }
            _ => spoil_tensor(random, &mut model.shards[shard], &other.shards[0]),
        };
        changes.push(change);
    }
    let mut files = vec![("config.json".to_owned(), serde_json::to_vec(&model.config).expect("JSON"))];
    if let Some(index) = &model.index {
        files.push(("model.safetensors.index.json".into(), serde_json::to_vec(index).expect("JSON")));
    }
    files.extend(model.shards.iter().map(|shard| (shard.file.clone(), write(shard))));
    if rounds == 0 || random.one_in(6) {
        let at = random.below(files.len());
        let (name, bytes) = &mut files[at];
        let tail = &model.shards[0].data;
        let change = match random.below(4) {
            0 if name.ends_with("safetensors") => {
                let len = random.integer(u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")));
                bytes[..8].copy_from_slice(&len.to_le_bytes());
                format!("a header of {len}")
            }
            // Keys that occur twice, which no map can hold.
            1 => {
                let pairs = bytes.windows(2).enumerate();
                let mut keys: Vec<usize> =
                    pairs.filter(|(_, pair)| pair == b",\"").map(|(at, _)| at).take(500).collect();
                keys.push(bytes.len());
                let which = random.below(keys.len() - 1);
                let at = keys[which];
                let until = keys[(which + 1).min(keys.len() - 1)];
                let again = bytes[at..until].to_vec();
                bytes.splice(at..at, again);
                format!("{at} to {until} twice")
            }
            _ => {
                let end = if random.one_in(2) { bytes.len() } else { 2000 };
                random.spoil_bytes(bytes, 0, end, tail)
            }
        };
        changes.push(format!("{name}: {change}"));
    }
    if random.one_in(60) {
        let (name, _) = files.swap_remove(random.below(files.len()));
        changes.push(format!("{name} removed"));
    }
    for (name, bytes) in files {
        std::fs::write(path.join(name), bytes).expect("a temporary file");
    }
    path
}

/// Writes the fixture into `dir` with the tensor `name` as a scalar.
pub(crate) fn with_scalar(dir: &Path, seed: &str, name: &str) -> PathBuf {
    let mut model = models().iter().find(|model| model.seed == seed).expect("a fixture").clone();
    let shard = &mut model.shards[0];
    let mut tensors = parts(shard);
    tensors.iter_mut().find(|tensor| tensor.0 == name).expect("a tensor").1["shape"] = json!([]);
    lay_out(shard, tensors);
    std::fs::write(dir.join("config.json"), model.config.to_string()).expect("a temporary file");
    std::fs::write(dir.join(&model.shards[0].file), write(&model.shards[0])).expect("a temporary file");
    dir.into()
}

fn write(shard: &Shard) -> Vec<u8> {
    let header = serde_json::to_vec(&shard.header).expect("JSON");
    [&(header.len() as u64).to_le_bytes()[..], &header, &shard.data].concat()
}

fn spoil_config(random: &mut Random, config: &mut Value, other: &Value) -> String {
    // Half of the changes to the few that are quantised or have a rope of their own go there.
    for key in ["quantization_config", "rope_scaling", "rope_parameters", "text_config"] {
        if config.get(key).is_some_and(Value::is_object) && random.one_in(3) {
            return format!("{key}: {}", json::spoil(random, &mut config[key]));
        }
    }
    if random.one_in(4)
        && let (Value::Object(config), Value::Object(other)) = (&mut *config, other)
    {
        let keys: Vec<&String> = other.keys().collect();
        let key = random.pick(&keys);
        config.insert(key.clone(), other[key].clone());
        return format!("{key} = {} of another model", other[key]);
    }
    format!("config: {}", json::spoil(random, config))
}

fn size_of(dtype: &str) -> usize {
    match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        _ => 1,
    }
}

/// Changes a tensor and lays the file out anew, so that the format's own checks pass.
fn spoil_tensor(random: &mut Random, shard: &mut Shard, other: &Shard) -> String {
    let mut tensors = parts(shard);
    if tensors.is_empty() {
        return "no tensors".into();
    }
    let at = random.below(tensors.len());
    let (name, info, data) = &mut tensors[at];
    let mut change = name.clone();
    let shape = info["shape"].as_array().cloned().unwrap_or_default();
    let mut shape: Vec<u64> = shape.iter().filter_map(Value::as_u64).collect();
    match random.below(12) {
        0 => {
            tensors.remove(at);
            change += " removed";
        }
        1 => {
            *name = random.pick(&other.header.keys().cloned().collect::<Vec<_>>());
            change += &format!(" renamed {name}");
        }
        2 => {
            let mut again = tensors[at].clone();
            again.0 = random.pick(&other.header.keys().cloned().collect::<Vec<_>>());
            change += &format!(" again as {}", again.0);
            tensors.push(again);
        }
        3 | 4 => {
            let len = data.len();
            random.spoil_bytes(data, 0, usize::MAX, &other.data);
            data.resize(len, 0);
            change += ": data";
        }
        5 => {
            let swap = random.below(tensors.len());
            let [a, b] = [at, swap].map(|at| tensors[at].0.clone());
            change += &format!(" and {b} swapped");
            (tensors[at].0, tensors[swap].0) = (b, a);
        }
        6 | 7 => {
            let dtype = random.pick(&["F32", "F16", "BF16", "I32", "U32", "F64", "I64", "U8", "BOOL"]);
            let dtype = if random.one_in(6) { random.pick(WORDS) } else { dtype };
            info["dtype"] = json!(dtype);
            change += &format!(" as {dtype}");
        }
        _ => {
            match random.below(7) {
                0 => drop(shape.pop()),
                1 => shape.push(1),
                2 => shape.reverse(),
                3 => shape.clear(),
                4 => shape.insert(0, 1),
                _ if !shape.is_empty() => {
                    let dim = random.below(shape.len());
                    shape[dim] = random.integer(shape[dim]);
                }
                _ => {}
            }
            change += &format!(" of shape {shape:?}");
            info["shape"] = json!(shape);
        }
    }
    lay_out(shard, tensors);
    change
}

/// A tensor's name, its entry of the header and its bytes.
type Part = (String, Value, Vec<u8>);

fn parts(shard: &Shard) -> Vec<Part> {
    let data = |info: &Value| {
        let at = |index: usize| info["data_offsets"].get(index)?.as_u64().map(|at| at as usize);
        shard.data.get(at(0)?..at(1)?).map(<[u8]>::to_vec)
    };
    let tensors = shard.header.iter().filter(|(_, info)| info.get("data_offsets").is_some());
    tensors.map(|(name, info)| (name.clone(), info.clone(), data(info).unwrap_or_default())).collect()
}

/// Puts the tensors one after another, each with as many bytes as its shape needs where that is not too many.
fn lay_out(shard: &mut Shard, tensors: Vec<Part>) {
    let mut map = Map::new();
    let mut all = Vec::new();
    for (name, mut info, mut data) in tensors {
        let size = size_of(info["dtype"].as_str().unwrap_or(""));
        let shape = info["shape"].as_array().cloned().unwrap_or_default();
        let count = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(dim.as_u64()?));
        if let Some(len) = count.and_then(|count| count.checked_mul(size as u64))
            && len <= DATA_MAX as u64
        {
            data.resize(len as usize, 0x11);
        }
        info["data_offsets"] = json!([all.len(), all.len() + data.len()]);
        all.extend(data);
        map.insert(name, info);
    }
    (shard.header, shard.data) = (map, all);
}
