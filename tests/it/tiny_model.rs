//! A model file of a few kilobytes with pseudo-random weights, whose tokens are bytes: enough for the
//! program to load, serve and compare.

use std::path::Path;

use crate::http_tokens::bytes;

const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

const WIDTH: u64 = 64;
const FFN: u64 = 128;
const CONTEXT: u32 = 256;

/// Writes a llama model of one layer to `path`; `seed` chooses its weights. Texts begin with the control
/// token 256, whose text is `begin`.
pub(crate) fn write(path: &Path, seed: u64, begin: &str) {
    let mut tokens = bytes();
    tokens.push(begin.to_owned());
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| if id < 256 { 1 } else { 3 }).collect();
    let vocab = tokens.len() as u64;
    let name = "tokenizer.ggml";
    let keys: Vec<(String, u32, Vec<u8>)> = [
        ("block_count", 1),
        ("context_length", CONTEXT),
        ("embedding_length", WIDTH as u32),
        ("feed_forward_length", FFN as u32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ]
    .map(|(key, value)| (format!("llama.{key}"), U32, value.to_le_bytes().to_vec()))
    .into_iter()
    .chain([
        ("general.architecture".into(), STRING, string("llama")),
        ("general.name".into(), STRING, string("Tiny")),
        ("llama.attention.layer_norm_rms_epsilon".into(), F32, 1e-5_f32.to_le_bytes().to_vec()),
        (format!("{name}.model"), STRING, string("gpt2")),
        (format!("{name}.tokens"), ARRAY, array(STRING, tokens.iter().map(|token| string(token)))),
        (format!("{name}.token_type"), ARRAY, array(5, kinds.iter().map(|kind| kind.to_le_bytes().to_vec()))),
        (format!("{name}.merges"), ARRAY, array(STRING, [].into_iter())),
        (format!("{name}.bos_token_id"), U32, 256_u32.to_le_bytes().to_vec()),
        (format!("{name}.add_bos_token"), BOOL, vec![1]),
    ])
    .collect();
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[WIDTH, vocab]),
        ("output_norm.weight", &[WIDTH]),
        ("blk.0.attn_norm.weight", &[WIDTH]),
        ("blk.0.attn_q.weight", &[WIDTH, WIDTH]),
        ("blk.0.attn_k.weight", &[WIDTH, WIDTH / 2]),
        ("blk.0.attn_v.weight", &[WIDTH, WIDTH / 2]),
        ("blk.0.attn_output.weight", &[WIDTH, WIDTH]),
        ("blk.0.ffn_norm.weight", &[WIDTH]),
        ("blk.0.ffn_gate.weight", &[WIDTH, FFN]),
        ("blk.0.ffn_up.weight", &[WIDTH, FFN]),
        ("blk.0.ffn_down.weight", &[FFN, WIDTH]),
    ];
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, kind, value) in keys {
        out.extend(string(&key));
        out.extend(kind.to_le_bytes());
        out.extend(value);
    }
    let mut data: Vec<u8> = Vec::new();
    let mut state = seed;
    for (tensor, dims) in tensors {
        out.extend(string(tensor));
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend(0_u32.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        for _ in 0..dims.iter().product() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let random = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            let value = if dims.len() == 1 { 1.0 } else { random * 0.6 };
            data.extend(value.to_le_bytes());
        }
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    std::fs::write(path, out).expect("a temporary file");
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn array(kind: u32, values: impl ExactSizeIterator<Item = Vec<u8>>) -> Vec<u8> {
    let head = [&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    values.fold(head, |mut bytes, value| {
        bytes.extend(value);
        bytes
    })
}
