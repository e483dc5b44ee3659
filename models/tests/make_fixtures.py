#!/usr/bin/env python3
"""Writes small random models as GGUF, each with the logits that HF transformers gives in f32, where K and V
are rounded to f16 before use as in our cache; prints how far that is from the logits without rounding.

Made with Python 3.11, gguf 0.19.0, numpy 2.4.6, torch 2.15.0 (on CPU), transformers 5.23.0.
Run it in a virtual environment that has those four: python models/tests/make_fixtures.py
It overwrites models/tests/fixtures/*.gguf and *.json; the same versions give the same files.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

OUT = Path(__file__).parent / "fixtures"
VOCAB = 160
TOKENS = 40
F32 = gguf.GGMLQuantizationType.F32
F16 = gguf.GGMLQuantizationType.F16
BF16 = gguf.GGMLQuantizationType.BF16
Q4_0 = gguf.GGMLQuantizationType.Q4_0
Q4_1 = gguf.GGMLQuantizationType.Q4_1
Q5_0 = gguf.GGMLQuantizationType.Q5_0
Q5_1 = gguf.GGMLQuantizationType.Q5_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    name = name.removeprefix("model.")
    for ours, theirs in {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}.items():
        if name == f"{ours}.weight":
            return f"{theirs}.weight"
    _, index, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{LAYER[part]}.{kind}"


def adjacent_pairs(weight, heads):
    """Rows of a head from halves (i, i + d/2) to adjacent pairs (2 i, 2 i + 1), as llama's GGUF has them."""
    per_head = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return per_head.swapaxes(1, 2).reshape(weight.shape)


def f16_kv_attention(module, query, key, value, *args, **kwargs):
    return eager_attention_forward(module, query, key.half().float(), value.half().float(), *args, **kwargs)


def quantize(array, dtype):
    """The tensor's bytes, and the values that they stand for."""
    raw = gguf.quants.quantize(array, dtype)
    return raw, gguf.quants.dequantize(raw, dtype).astype(np.float32).reshape(array.shape)


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:
            parameter.data = noise * 1.5 / parameter.shape[1] ** 0.5


def write(name, model, dtype_of, seed):
    config = model.config
    arch = config.model_type
    randomize(model, seed)
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", arch)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for their_name, parameter in model.named_parameters():
        array = parameter.data.numpy()
        our_name = gguf_name(their_name)
        dtype = F32 if array.ndim == 1 else dtype_of(our_name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        heads = heads.get(our_name.split(".")[-2]) if arch == "llama" else None
        # Rows are permuted, and quantised each by itself: so the order of the two does not matter.
        raw, values = quantize(array, dtype)
        parameter.data = torch.from_numpy(values)
        if heads:
            raw = adjacent_pairs(raw, heads)
        writer.add_tensor(our_name, np.ascontiguousarray(raw), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tokens = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        unrounded = model(tokens).logits[0]
        # The mask is made for "eager", the attention is exchanged below it.
        config._attn_implementation = "f16_kv"
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
        logits = model(tokens, attention_mask=mask).logits[0]
    off = (logits - unrounded).abs().max() / unrounded.abs().max()
    print(f"{name}: rounding K and V to f16 changes logits by up to {off:.1e} of the largest")
    expected = {"tokens": tokens[0].tolist(), "logits": [[float(f"{x:.7g}") for x in row] for row in logits.tolist()]}
    (OUT / f"{name}.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


def shape(rope_theta, **more):
    rope = {"rope_type": "default", "rope_theta": rope_theta} | more.pop("rope", {})
    base = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return base | more


def mixed(name):
    """Formats that agree in some groups and differ in others."""
    for part, dtype in {
        "token_embd": Q8_0,
        "attn_v": Q5_1,
        "attn_output": Q4_0,
        "ffn_gate": Q4_1,
        "ffn_up": Q5_0,
        "ffn_down": Q8_0,
    }.items():
        if part in name:
            return dtype
    return Q4_1


def main():
    torch.set_grad_enabled(False)
    AttentionInterface.register("f16_kv", f16_kv_attention)
    OUT.mkdir(exist_ok=True)
    write("llama_tied", LlamaForCausalLM(LlamaConfig(**shape(1e5, tie_word_embeddings=True))), lambda _: F32, 1)
    untied = shape(
        1e4,
        tie_word_embeddings=False,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope={"rope_type": "linear", "factor": 2.0},
    )
    write("llama_untied", LlamaForCausalLM(LlamaConfig(**untied)), lambda _: F32, 2)
    write("qwen2_tied", Qwen2ForCausalLM(Qwen2Config(**shape(1e6, tie_word_embeddings=True))), lambda _: F32, 3)
    untied = shape(1e6, tie_word_embeddings=False, num_key_value_heads=1, num_hidden_layers=3)
    write("qwen2_untied", Qwen2ForCausalLM(Qwen2Config(**untied)), lambda name: BF16 if "ffn" in name else F16, 4)
    write("llama_mixed", LlamaForCausalLM(LlamaConfig(**shape(1e5, tie_word_embeddings=True))), mixed, 5)
    write("qwen2_q4_1", Qwen2ForCausalLM(Qwen2Config(**shape(1e6, tie_word_embeddings=True))), lambda _: Q4_1, 6)


if __name__ == "__main__":
    main()
