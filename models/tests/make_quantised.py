#!/usr/bin/env python3
"""Writes tensors of each GGUF block type with the values that they stand for, and small random llamas whose weights are
in K-quants, GPTQ or AWQ, each with the logits that HF transformers gives in f32 with the dequantised weights.

Made with Python 3.11, gguf 0.19.0, numpy 2.4.6, torch 2.15.0 (on CPU), transformers 5.23.0. The layouts of GPTQ and AWQ
are those that auto-gptq 0.7.1 (`QuantLinear.pack`), gptqmodel 7.7.0 and autoawq 0.2.9 (`WQLinear_GEMM`) write and read.
Run it in a virtual environment that has the first five:
    python models/tests/make_quantised.py [--only NAME,..] [--server LLAMA-SERVER]
It overwrites models/tests/fixtures/types/* and models/tests/fixtures/families/NAME/*; the same versions give the same
files. See the README there.
"""

import argparse
import json
import shutil

import gguf
import numpy as np
import torch
import transformers
from make_families import (
    DEFAULT,
    GREEDY,
    OUT,
    START,
    VOCAB,
    build,
    compare_with_llama_cpp,
    expected_of,
    greedy,
    logits_of,
    make_config,
    randomize,
    write_json,
)
from make_fixtures import adjacent_pairs, gguf_name
from safetensors.torch import save_file

TYPES = OUT.parent / "types"
Type = gguf.GGMLQuantizationType

# Where the f16 fields of a block are: the scale, and what is added or subtracted.
HALVES = {
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q8_0: [0],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
}
# The mean of the quants, which the minimum takes away again.
MIDDLE = {Type.Q2_K: 1.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}


def random_blocks(rng, dtype, rows, columns):
    """Random bytes: (rows, blocks, bytes of a block)."""
    size, length = gguf.GGML_QUANT_SIZES[dtype]
    return rng.integers(0, 256, (rows, columns // size, length), dtype=np.uint8)


def put_halves(blocks, at, values):
    blocks[..., at : at + 2] = values.astype("<f2")[..., None].view(np.uint8)


def hard_halves(rng, shape):
    """Finite f16: of both signs, ordinary, subnormal, extreme, both zeros."""
    values = rng.normal(0, 0.1, shape).astype(np.float16)
    special = [0.0, -0.0, 2.0**-24, -(2.0**-24), 1000 * 2.0**-24, 2.0**-14, -(2.0**-14), 65504.0, -65504.0, 1.0]
    chosen = rng.choice(np.array(special, np.float16), shape)
    return np.where(rng.random(shape) < 0.4, chosen, values).astype(np.float16)


def write_types():
    """8 rows of 512 values in each type."""
    rng = np.random.default_rng(1)
    shutil.rmtree(TYPES, ignore_errors=True)
    TYPES.mkdir(parents=True)
    writer = gguf.GGUFWriter(TYPES / "types.gguf", "llama")
    expected = {}
    for dtype in [Type.F32, Type.F16, Type.BF16, *HALVES]:
        name = dtype.name.lower()
        if dtype == Type.F32:
            raw = rng.normal(0, 1, (8, 512)).astype(np.float32)
            raw[0, :4] = [0.0, -0.0, 1e-40, 3e38]
            values = raw
        elif dtype == Type.F16:
            raw = hard_halves(rng, (8, 512))
            values = raw.astype(np.float32)
        elif dtype == Type.BF16:
            # Any finite one: the exponent is not of ones only.
            bits = rng.integers(0, 1 << 16, (8, 512), dtype=np.uint16)
            bits[bits & 0x7F80 == 0x7F80] &= 0xBFFF
            raw = bits.view(np.uint8).reshape(8, 1024)
            values = (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            blocks = random_blocks(rng, dtype, 8, 512)
            for at in HALVES[dtype]:
                put_halves(blocks, at, hard_halves(rng, blocks.shape[:2]))
            raw = blocks.reshape(8, -1)
            values = gguf.quants.dequantize(raw, dtype)
        assert np.isfinite(values).all() and values.shape == (8, 512)
        plain = dtype in (Type.F32, Type.F16)
        writer.add_tensor(name, raw, raw_dtype=None if plain else dtype)
        expected[name] = torch.from_numpy(values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, TYPES / "expected.safetensors")


def sane_matrix(rng, dtype, rows, columns, std):
    """Random blocks that stand for values around 0 of about this deviation; and the values."""
    blocks = random_blocks(rng, dtype, rows, columns)
    scales = rng.uniform(0.5, 1.5, blocks.shape[:2])
    # In two steps, as the deviation at scale 1 is found by looking.
    for factor in (1.0, None):
        factor = factor or std / values.std()
        put_halves(blocks, HALVES[dtype][0], scales * factor)
        if dtype in MIDDLE:
            put_halves(blocks, HALVES[dtype][1], scales * factor * MIDDLE[dtype])
        raw = blocks.reshape(rows, -1)
        values = gguf.quants.dequantize(raw, dtype).astype(np.float32)
    return raw, values


def finish(out, model, seed, limit=2e-3):
    """Expected logits of a prompt of 16 tokens and its continuation, unless the greedy path is on a knife's edge."""
    generator = torch.Generator().manual_seed(seed + 50_000)
    tokens = torch.randint(3, VOCAB, (START,), generator=generator).tolist()
    logits = logits_of(model, tokens)
    enough = float(limit * logits.abs().max())
    continuation, gap = greedy(model, tokens, GREEDY, enough=enough)
    if gap <= enough or len(set(continuation)) < 12:
        return None
    print(f"{out.name}: largest logit {logits.abs().max():.3g}, min_gap {gap:.2e}, {len(set(continuation))} tokens")
    write_json(out / "expected.json", expected_of(tokens, logits, continuation, gap))
    return tokens, logits, continuation


def q4_k_m(name):
    return Type.Q6_K if "attn_v" in name or "ffn_down" in name else Type.Q4_K


# name: (seed, type of a tensor). The head is always of Q6_K.
K_QUANTS = {
    "llama_q4_k_m": (3000, q4_k_m),
    "llama_q2_k": (3100, lambda name: Type.Q2_K),
    "llama_q3_k": (3200, lambda name: Type.Q3_K),
    "llama_q5_k": (3300, lambda name: Type.Q5_K),
}


def write_k_quants(name, args):
    seed, dtype_of = K_QUANTS[name]
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shape = dict(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        rope_parameters=DEFAULT,
    )
    model = build(make_config("llama", shape))
    config = model.config
    found = None
    while found is None:
        seed += 1
        randomize(model, seed, torch.float32)
        rng = np.random.default_rng(seed)
        tensors = []
        for their_name, parameter in model.named_parameters():
            our_name = gguf_name(their_name)
            if parameter.ndim == 1:
                tensors.append((our_name, parameter.data.numpy(), None))
                continue
            dtype = Type.Q6_K if our_name == "output.weight" else dtype_of(our_name)
            raw, values = sane_matrix(rng, dtype, *parameter.shape, float(parameter.data.std()))
            parameter.data = torch.from_numpy(values)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            heads = heads.get(our_name.split(".")[-2])
            # Each row is quantised by itself, so rows can be permuted as they are.
            raw = adjacent_pairs(raw, heads) if heads else raw
            tensors.append((our_name, np.ascontiguousarray(raw), dtype))
        found = finish(out, model, seed)
    writer = gguf.GGUFWriter(out / "model.gguf", "llama")
    writer.add_name("small random")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(DEFAULT["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, VOCAB)])
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([2, 3, 3] + [1] * (VOCAB - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for our_name, raw, dtype in tensors:
        writer.add_tensor(our_name, raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if args.server:
        compare_with_llama_cpp(out / "model.gguf", args.server, *found)


def pack(nibbles, axis, order=range(8)):
    """Eight nibbles to an int32, along an axis; `order[i]` is which of the eight lies at bit 4 i."""
    nibbles = np.moveaxis(nibbles.astype(np.uint32), axis, -1)
    eights = nibbles.reshape(*nibbles.shape[:-1], -1, 8)
    packed = sum(eights[..., one] << np.uint32(4 * i) for i, one in enumerate(order))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)))


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gptq(group, sym, act_order, version):
    if version == "gptq_v2":
        meta = {"quantizer": ["gptqmodel:7.7.0"]}
        block = {"checkpoint_format": "gptq_v2", "lm_head": False, "meta": meta, "pack_dtype": "int32"}
    else:
        block = {
            "checkpoint_format": "gptq",
            "damp_percent": 0.01,
            "is_marlin_format": False,
            "model_file_base_name": None,
            "model_name_or_path": None,
            "static_groups": False,
        }
    return block | {
        "bits": 4,
        "desc_act": act_order,
        "group_size": group,
        "quant_method": "gptq",
        "sym": sym,
        "true_sequential": True,
    }


def awq(group):
    return {
        "bits": 4,
        "group_size": group,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


# name: (seed, intermediate size, quantization_config)
PACKED = {
    # The most usual one. Some writers add a bias of zeros to each layer: so does this one.
    "gptq_g128": (4000, 256, gptq(128, True, False, "gptq")),
    "gptq_g32_act_order": (4100, 128, gptq(32, False, True, "gptq")),
    "gptq_v2_g64": (4200, 128, gptq(64, False, False, "gptq_v2")),
    "awq_g128": (4300, 256, awq(128)),
    "awq_g64": (4400, 128, awq(64)),
}


def write_packed(name):
    seed, intermediate, block = PACKED[name]
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shape = dict(
        hidden_size=128, intermediate_size=intermediate, num_hidden_layers=1, rope_parameters=DEFAULT
    )
    model = build(make_config("llama", shape))
    found = None
    while found is None:
        seed += 1
        randomize(model, seed, torch.float16)
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, parameter in model.named_parameters():
            if "_proj" not in path:
                tensors[path] = parameter.data.half()
                continue
            layer = path.removesuffix(".weight")
            values, packed = quantised(rng, parameter.data.numpy(), block)
            parameter.data = torch.from_numpy(values)
            tensors |= {f"{layer}.{kind}": tensor for kind, tensor in packed.items()}
            if name == "gptq_g128":
                tensors[f"{layer}.bias"] = torch.zeros(len(values), dtype=torch.float16)
        found = finish(out, model, seed)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {"quantization_config": block, "dtype": "float16"}
    config["architectures"] = ["LlamaForCausalLM"]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def quantised(rng, weight, block):
    """Random nibbles in the place of `weight`, of its deviation; the values (out, in), and the tensors for the file."""
    rows, columns = weight.shape
    group = block["group_size"]
    groups = columns // group
    nibbles = rng.integers(0, 16, (columns, rows))
    scales = (rng.uniform(0.5, 1.5, (groups, rows)) * weight.std() / 4.6).astype(np.float16)
    if block.get("sym"):
        zeros = np.full((groups, rows), 8)
    else:
        # Not 0 where one is taken away: readers do not agree on what that gives.
        zeros = rng.integers(0 if block.get("checkpoint_format") != "gptq" else 1, 16, (groups, rows))
        # Mostly near the middle, so that weights are around 0.
        zeros = np.where(rng.random(zeros.shape) < 0.9, rng.integers(6, 10, zeros.shape), zeros)
    of = np.arange(columns) // group
    if block.get("desc_act"):
        of = rng.permutation(of)
    values = (nibbles - zeros[of]).astype(np.float32) * scales[of].astype(np.float32)
    if block["quant_method"] == "awq":
        packed = {"qweight": pack(nibbles, 1, AWQ_ORDER), "qzeros": pack(zeros, 1, AWQ_ORDER)}
    else:
        less = 1 if block["checkpoint_format"] == "gptq" else 0
        packed = {
            "qweight": pack(nibbles, 0),
            "qzeros": pack(zeros - less, 1),
            "g_idx": torch.from_numpy(of.astype(np.int32)),
        }
    packed["scales"] = torch.from_numpy(scales)
    return np.ascontiguousarray(values.T), packed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    everything = ["types", *K_QUANTS, *PACKED]
    parser.add_argument("--only", type=lambda text: text.split(","), default=everything)
    parser.add_argument("--server", help="llama.cpp's llama-server")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name in args.only:
        if name == "types":
            write_types()
        elif name in K_QUANTS:
            write_k_quants(name, args)
        else:
            write_packed(name)


if __name__ == "__main__":
    main()
