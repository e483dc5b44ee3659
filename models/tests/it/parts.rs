//! GGUF files made by hand, to be spoiled part by part.

pub(crate) const U32: u32 = 4;
pub(crate) const F32: u32 = 6;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;

/// A GGUF file in parts, so that a test can spoil any of them.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    /// (name, value type, value's bytes)
    pub(crate) keys: Vec<(String, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Innermost first, as in the file.
    pub(crate) dims: Vec<u64>,
    pub(crate) dtype: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn tensor(name: &str, dims: &[u64], dtype: u32, block: (u64, u64)) -> Tensor {
    let bytes = dims.iter().product::<u64>() / block.0 * block.1;
    Tensor { name: name.into(), dims: dims.into(), dtype, offset: None, data: vec![0; bytes as usize] }
}

impl Parts {
    /// A good llama model of one layer: width 32, 2 heads, ffn 64, vocabulary 8.
    pub(crate) fn good() -> Self {
        let dense = |name: &str, dims: &[u64]| tensor(name, dims, 0, (1, 4));
        let q4 = |name: &str, dims: &[u64]| tensor(name, dims, 3, (32, 20));
        let key = |name: &str, value: u32| (format!("llama.{name}"), U32, value.to_le_bytes().to_vec());
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            key_count: None,
            keys: vec![
                ("general.architecture".into(), STRING, string("llama")),
                key("block_count", 1),
                key("context_length", 64),
                key("embedding_length", 32),
                key("feed_forward_length", 64),
                key("attention.head_count", 2),
                key("attention.head_count_kv", 1),
                ("llama.attention.layer_norm_rms_epsilon".into(), F32, 1e-5f32.to_le_bytes().to_vec()),
            ],
            tensors: vec![
                dense("token_embd.weight", &[32, 8]),
                dense("output_norm.weight", &[32]),
                dense("blk.0.attn_norm.weight", &[32]),
                q4("blk.0.attn_q.weight", &[32, 32]),
                q4("blk.0.attn_k.weight", &[32, 16]),
                q4("blk.0.attn_v.weight", &[32, 16]),
                q4("blk.0.attn_output.weight", &[32, 32]),
                dense("blk.0.ffn_norm.weight", &[32]),
                q4("blk.0.ffn_gate.weight", &[32, 64]),
                q4("blk.0.ffn_up.weight", &[32, 64]),
                q4("blk.0.ffn_down.weight", &[64, 32]),
            ],
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (name, value_type, value) in &self.keys {
            out.extend(string(name));
            out.extend(value_type.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.dtype.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    pub(crate) fn set(&mut self, name: &str, value_type: u32, value: &[u8]) {
        self.keys.retain(|key| key.0 != name);
        self.keys.push((name.into(), value_type, value.into()));
    }

    pub(crate) fn set_u32(&mut self, name: &str, value: u32) {
        self.set(name, U32, &value.to_le_bytes());
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the good file")
    }
}
