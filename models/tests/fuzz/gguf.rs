//! Spoils GGUF files: by their parts, by the integers of the header, and as bytes.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::fixture;
use crate::random::{Random, WORDS};

const SEEDS: &[&str] = &[
    "gemma",
    "gemma2_gguf",
    "gemma3_gguf",
    "gpt2",
    "granite",
    "llama",
    "llama_llama3_rope",
    "llama_q2_k",
    "llama_q3_k",
    "llama_q4_k_m",
    "llama_q5_k",
    "mixtral",
    "olmo2",
    "phi3_longrope_long",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3_gguf",
];
const MORE: &[&str] = &["llama_mixed.gguf", "qwen2_q4_1.gguf", "types/types.gguf"];

const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// Bytes that a tensor is filled up to when its shape grows.
const DATA_MAX: usize = 1 << 20;

#[derive(Clone)]
struct Key {
    name: Vec<u8>,
    kind: u32,
    value: Vec<u8>,
    /// It may not be a value of its type.
    spoiled: bool,
}

#[derive(Clone)]
struct Tensor {
    name: Vec<u8>,
    dims: Vec<u64>,
    dtype: u32,
    /// Where its data is said to be, if not where it is.
    offset: Option<u64>,
    data: Vec<u8>,
}

#[derive(Clone)]
struct File {
    seed: String,
    bytes: Vec<u8>,
    keys: Vec<Key>,
    tensors: Vec<Tensor>,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("8 bytes"))
    }

    fn string(&mut self) -> &'a [u8] {
        let len = self.u64() as usize;
        self.take(len)
    }

    fn value(&mut self, kind: u32) -> &'a [u8] {
        let all = self.0;
        match kind {
            STRING => {
                self.string();
            }
            ARRAY => {
                let (item, count) = (self.u32(), self.u64());
                for _ in 0..count {
                    self.value(item);
                }
            }
            scalar => {
                self.take(width(scalar));
            }
        }
        &all[..all.len() - self.0.len()]
    }
}

/// Bytes of a scalar.
fn width(kind: u32) -> usize {
    match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        10..=12 => 8,
        _ => 4,
    }
}

/// Values and bytes of a block.
fn block(dtype: u32) -> (u64, u64) {
    match dtype {
        0 => (1, 4),
        1 | 30 => (1, 2),
        2 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        _ => (256, 292),
    }
}

fn parse(seed: &str, path: &Path) -> File {
    let bytes = std::fs::read(path).expect("the fixture");
    let mut reader = Reader(&bytes);
    reader.take(8);
    let (tensors, keys) = (reader.u64(), reader.u64());
    let keys = (0..keys).map(|_| {
        let (name, kind) = (reader.string().to_vec(), reader.u32());
        Key { name, kind, value: reader.value(kind).to_vec(), spoiled: false }
    });
    let keys = keys.collect();
    let mut tensors: Vec<Tensor> = (0..tensors)
        .map(|_| {
            let name = reader.string().to_vec();
            let dims = (0..reader.u32()).map(|_| reader.u64()).collect();
            Tensor { name, dims, dtype: reader.u32(), offset: Some(reader.u64()), data: Vec::new() }
        })
        .collect();
    let start = (bytes.len() - reader.0.len()).next_multiple_of(32);
    for tensor in &mut tensors {
        let at = start + tensor.offset.take().expect("an offset") as usize;
        let (values, size) = block(tensor.dtype);
        let len = tensor.dims.iter().product::<u64>() / values * size;
        tensor.data = bytes[at..at + len as usize].to_vec();
    }
    File { seed: seed.into(), bytes, keys, tensors }
}

fn files() -> &'static [File] {
    static FILES: OnceLock<Vec<File>> = OnceLock::new();
    FILES.get_or_init(|| {
        let families = SEEDS.iter().map(|name| parse(name, &fixture(&format!("families/{name}/model.gguf"))));
        families.chain(MORE.iter().map(|name| parse(name, &fixture(name)))).collect()
    })
}

/// The file's bytes, and where the header's integers are and how wide.
fn write(file: &File, counts: [Option<u64>; 2]) -> (Vec<u8>, usize, Vec<(usize, usize)>) {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    let mut fields = vec![(4, 4), (8, 8), (16, 8)];
    out.extend(counts[0].unwrap_or(file.tensors.len() as u64).to_le_bytes());
    out.extend(counts[1].unwrap_or(file.keys.len() as u64).to_le_bytes());
    for key in &file.keys {
        fields.extend([
            (out.len(), 8),
            (out.len() + 8 + key.name.len(), 4),
            (out.len() + 12 + key.name.len(), 8),
        ]);
        out.extend((key.name.len() as u64).to_le_bytes());
        out.extend(&key.name);
        out.extend(key.kind.to_le_bytes());
        out.extend(&key.value);
    }
    let mut data = Vec::new();
    for tensor in &file.tensors {
        fields.push((out.len(), 8));
        out.extend((tensor.name.len() as u64).to_le_bytes());
        out.extend(&tensor.name);
        fields.push((out.len(), 4));
        out.extend((tensor.dims.len() as u32).to_le_bytes());
        for dim in &tensor.dims {
            fields.push((out.len(), 8));
            out.extend(dim.to_le_bytes());
        }
        fields.extend([(out.len(), 4), (out.len() + 4, 8)]);
        out.extend(tensor.dtype.to_le_bytes());
        out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
        data.extend(&tensor.data);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let header = out.len();
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    (out, header, fields)
}

/// Writes a spoiled file into `dir`.
pub(crate) fn spoil(random: &mut Random, dir: &Path, changes: &mut Vec<String>) -> PathBuf {
    let mut file = random.pick(files());
    let other = random.pick(files());
    changes.push(file.seed.clone());
    let mut counts = [None; 2];
    let rounds = random.pick(&[0, 1, 1, 1, 2, 3]);
    for _ in 0..rounds {
        let change = match random.below(20) {
            0..=8 => spoil_keys(random, &mut file.keys, &other.keys),
            9..=18 => spoil_tensors(random, &mut file.tensors, &other.tensors),
            _ => {
                let which = random.below(2);
                counts[which] = Some(random.integer(file.keys.len() as u64));
                format!("counts {counts:?}")
            }
        };
        changes.push(change);
    }
    let (mut bytes, header, fields) = write(&file, counts);
    if rounds == 0 || random.one_in(6) {
        let change = if random.one_in(2) {
            let (at, width) = random.pick(&fields);
            let value = random.integer(u64::from(bytes[at]));
            if let Some(field) = bytes.get_mut(at..at + width) {
                field.copy_from_slice(&value.to_le_bytes()[..width]);
            }
            format!("the field at {at} = {value}")
        } else {
            let end = if random.one_in(3) { bytes.len() } else { header };
            random.spoil_bytes(&mut bytes, 0, end, &other.bytes)
        };
        changes.push(change);
    }
    let path = dir.join("model.gguf");
    drop(std::fs::remove_file(&path));
    std::fs::write(&path, bytes).expect("a temporary file");
    path
}

/// Writes the fixture into `dir` with the tensor `name` of that type and those dimensions, full of `byte`.
pub(crate) fn with_tensor(
    dir: &Path,
    seed: &str,
    name: &str,
    dtype: u32,
    dims: Option<&[u64]>,
    byte: u8,
) -> PathBuf {
    let mut file = files().iter().find(|file| file.seed == seed).expect("a fixture").clone();
    let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes()).expect("a tensor");
    tensor.dtype = dtype;
    tensor.dims = dims.map_or(tensor.dims.clone(), <[u64]>::to_vec);
    tensor.data.clear();
    fill(tensor);
    tensor.data.fill(byte);
    let path = dir.join("model.gguf");
    std::fs::write(&path, write(&file, [None; 2]).0).expect("a temporary file");
    path
}

/// Writes the fixture into `dir` with another value of a 32-bit key.
pub(crate) fn with_key(dir: &Path, seed: &str, name: &str, value: u32) -> PathBuf {
    let mut file = files().iter().find(|file| file.seed == seed).expect("a fixture").clone();
    let key = file.keys.iter_mut().find(|key| key.name == name.as_bytes()).expect("a key");
    key.value = value.to_le_bytes().to_vec();
    let path = dir.join("model.gguf");
    std::fs::write(&path, write(&file, [None; 2]).0).expect("a temporary file");
    path
}

fn spoil_keys(random: &mut Random, keys: &mut Vec<Key>, others: &[Key]) -> String {
    if keys.is_empty() {
        return "no keys".into();
    }
    let at = random.below(keys.len());
    let name = String::from_utf8_lossy(&keys[at].name).into_owned();
    let choice = if keys[at].spoiled { random.below(5) } else { random.below(12) };
    match choice {
        0 => {
            keys.remove(at);
            format!("{name} removed")
        }
        1 => {
            keys.push(keys[at].clone());
            format!("{name} twice")
        }
        2 => {
            let new =
                if random.one_in(2) { random.pick(keys).name } else { [&keys[at].name, &b"x"[..]].concat() };
            keys[at].name = new;
            format!("{name} renamed {}", String::from_utf8_lossy(&keys[at].name))
        }
        3 => {
            let other = random.pick(others);
            keys[at] = Key { name: keys[at].name.clone(), ..other.clone() };
            format!("{name} has the value of another file's {}", String::from_utf8_lossy(&other.name))
        }
        4 => {
            let other = random.pick(others);
            // Under this file's architecture.
            let part = String::from_utf8_lossy(&other.name).into_owned();
            let prefix = name.split('.').next().unwrap_or("llama").to_owned();
            let part = part.split_once('.').map_or(part.clone(), |(_, part)| format!("{prefix}.{part}"));
            keys.push(Key { name: part.clone().into(), ..other });
            format!("{part} of another file added")
        }
        5 => {
            keys[at].kind = random.below(14) as u32;
            keys[at].spoiled = true;
            if random.below(4) > 0 && keys[at].kind < STRING {
                let width = width(keys[at].kind);
                keys[at].value = random.integer(1).to_le_bytes()[..width].to_vec();
            }
            format!("{name} has the type {}", keys[at].kind)
        }
        _ => {
            let Key { kind, value, spoiled, .. } = &mut keys[at];
            *spoiled = true;
            spoil_value(random, *kind, value);
            format!("{name}: type {kind}, {:?}", &value[..value.len().min(24)])
        }
    }
}

fn spoil_value(random: &mut Random, kind: u32, value: &mut Vec<u8>) {
    match kind {
        STRING => {
            let text = match random.below(6) {
                0 => vec![0xff; 3],
                1 => vec![b'{'; 1 << random.below(16)],
                2 => value[8..value.len() - (value.len() - 8) / 2].to_vec(),
                _ => random.pick(WORDS).as_bytes().to_vec(),
            };
            *value = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        }
        ARRAY => spoil_array(random, value),
        6 => *value = (random.float() as f32).to_le_bytes().to_vec(),
        12 => *value = random.float().to_le_bytes().to_vec(),
        _ => {
            let mut near = [0; 8];
            near[..value.len()].copy_from_slice(value);
            let new = random.integer(u64::from_le_bytes(near)).to_le_bytes();
            let len = value.len();
            value.copy_from_slice(&new[..len]);
        }
    }
}

fn spoil_array(random: &mut Random, value: &mut Vec<u8>) {
    let mut reader = Reader(value);
    let (mut kind, count) = (reader.u32(), reader.u64());
    let mut items: Vec<Vec<u8>> = (0..count).map(|_| reader.value(kind).to_vec()).collect();
    let mut stated = None;
    let at = random.below(items.len());
    match random.below(9) {
        0 => items.clear(),
        1 => items.truncate(at),
        2 => items.extend(items.clone()),
        3 => stated = Some(random.integer(count)),
        4 => kind = random.below(14) as u32,
        5 if !items.is_empty() => {
            let to = random.below(items.len());
            items[to] = items[at].clone();
        }
        6 => {
            items = vec![value.clone()];
            kind = ARRAY;
        }
        _ if !items.is_empty() => (0..3).for_each(|_| {
            let at = random.below(items.len());
            spoil_value(random, kind, &mut items[at]);
        }),
        _ => {}
    }
    let count = stated.unwrap_or(items.len() as u64);
    *value = [&kind.to_le_bytes()[..], &count.to_le_bytes(), &items.concat()].concat();
}

fn spoil_tensors(random: &mut Random, tensors: &mut Vec<Tensor>, others: &[Tensor]) -> String {
    if tensors.is_empty() {
        return "no tensors".into();
    }
    let at = random.below(tensors.len());
    let name = String::from_utf8_lossy(&tensors[at].name).into_owned();
    match random.below(12) {
        0 => {
            tensors.remove(at);
            format!("{name} removed")
        }
        1 => {
            let mut again = tensors[at].clone();
            if random.one_in(2) {
                again.name = random.pick(others).name;
            }
            tensors.push(again);
            format!("{name} twice")
        }
        2 => {
            tensors[at].name =
                if random.one_in(2) { random.pick(others).name } else { random.pick(tensors).name };
            format!("{name} renamed {}", String::from_utf8_lossy(&tensors[at].name))
        }
        3 => {
            let offset = random.integer(at as u64 * 32);
            tensors[at].offset = Some(offset);
            format!("{name} at {offset}")
        }
        4 => {
            let other = random.pick(others);
            tensors.push(other.clone());
            format!("{} of another file added", String::from_utf8_lossy(&other.name))
        }
        5 => {
            let tensor = &mut tensors[at];
            let change = random.spoil_bytes(&mut tensor.data, 0, usize::MAX, &others[0].data);
            format!("{name}: data: {change}")
        }
        6 => {
            let tensor = &mut tensors[at];
            tensor.dtype = if random.one_in(8) { random.integer(1) as u32 } else { random.below(16) as u32 };
            fill(tensor);
            format!("{name} has the type {}", tensor.dtype)
        }
        _ => {
            let tensor = &mut tensors[at];
            match random.below(7) {
                0 => drop(tensor.dims.pop()),
                1 => tensor.dims.push(random.pick(&[1, 2])),
                2 => tensor.dims.reverse(),
                3 => tensor.dims.clear(),
                4 => tensor.dims.resize(random.below(7), 1),
                _ if !tensor.dims.is_empty() => {
                    let dim = random.below(tensor.dims.len());
                    tensor.dims[dim] = random.integer(tensor.dims[dim]);
                }
                _ => {}
            }
            if random.below(4) > 0 {
                fill(tensor);
            }
            format!("{name} has the dimensions {:?}", tensor.dims)
        }
    }
}

/// As many bytes as the shape needs, where that is not too many.
fn fill(tensor: &mut Tensor) {
    let (values, size) = block(tensor.dtype);
    let count = tensor.dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    if let Some(len) = count.and_then(|count| (count / values).checked_mul(size))
        && len <= DATA_MAX as u64
    {
        tensor.data.resize(len as usize, 0x11);
    }
}
