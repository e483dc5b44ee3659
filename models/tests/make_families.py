#!/usr/bin/env python3
"""Writes a small random checkpoint of each model family, as HF transformers saves it, with the logits and the greedy
continuation that transformers gives in f32 with eager attention; prints how much each special feature matters.

Made with Python 3.11, gguf 0.19.0, numpy 2.4.6, torch 2.15.0 (on CPU), transformers 5.23.0 and llama.cpp as in
llama-cpp-python 0.3.36. Run it in a virtual environment that has the first five:
    python models/tests/make_families.py [--only NAME,..] [--converter CONVERT_HF_TO_GGUF.PY] [--server LLAMA-SERVER]
Without a converter there are no GGUF files; with a server they are compared with what llama.cpp computes from them.
It overwrites models/tests/fixtures/families/NAME/*; the same versions give the same files. See the README there.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).parent / "fixtures" / "families"
VOCAB = 160
PROMPT = 48
START = 16
GREEDY = 64
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

BASE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=True,
)
SMALL = dict(hidden_size=32, head_dim=16)
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e2,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.1, 1.2, 1.35, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0],
}


def flat_norms(*names):
    """Switches off the named norms' weights (not the norms themselves)."""

    def off(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in names) and name.endswith("weight"):
                parameter.data.fill_(1)

    return off


def zero(*names):
    def off(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.data.fill_(0)

    return off


def unsharp(name):
    """Without the norm that bears this name: its module returns what it is given."""

    def off(model):
        for path, module in model.named_modules():
            if path.endswith(name):
                module.forward = lambda x, *_: x

    return off


# name: (model type, dtype of the file, seed, config, switches). A switch is a change of the config, or of the model;
# it must change the logits.
FAMILIES = {
    "llama": (
        "llama",
        BF16,
        100,
        dict(num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=DEFAULT),
        {"rope theta": {"rope_parameters": DEFAULT | {"rope_theta": 1e2}}},
    ),
    "llama_llama3_rope": (
        "llama",
        BF16,
        200,
        dict(**SMALL, rope_parameters=LLAMA3),
        {
            "llama3 scaling": {"rope_parameters": DEFAULT},
            "its smooth middle": {"rope_parameters": LLAMA3 | {"low_freq_factor": 3.99}},
        },
    ),
    "llama_linear_rope": (
        "llama",
        F16,
        300,
        dict(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        {"linear scaling": {"rope_parameters": DEFAULT}},
    ),
    "llama_biases": (
        "llama",
        F32,
        400,
        dict(hidden_size=48, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=DEFAULT),
        {
            "attention_bias": {"attention_bias": False},
            "mlp_bias": {"mlp_bias": False},
            "bias of o": zero("o_proj.bias"),
        },
    ),
    "llama_yarn": (
        "llama",
        BF16,
        500,
        dict(**SMALL, rope_parameters=YARN),
        {
            "yarn": {"rope_parameters": DEFAULT | {"rope_theta": 1e2}},
            "its attention factor": {"rope_parameters": YARN | {"attention_factor": 1.0}},
            "its beta_fast": {"rope_parameters": YARN | {"beta_fast": 32.0}},
        },
    ),
    "mistral": (
        "mistral",
        BF16,
        600,
        dict(**SMALL, num_key_value_heads=1, sliding_window=8, tie_word_embeddings=False, rope_parameters=DEFAULT),
        {"sliding_window": {"sliding_window": None}, "a window of one less": {"sliding_window": 7}},
    ),
    "mixtral": (
        "mixtral",
        BF16,
        700,
        dict(**SMALL, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, rope_parameters=DEFAULT),
        {"top 2": {"num_experts_per_tok": 1}, "routing": zero("gate.weight")},
    ),
    "qwen2": (
        "qwen2",
        BF16,
        800,
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"biases of q, k, v": zero("proj.bias")},
    ),
    "qwen2_window": (
        "qwen2",
        F16,
        900,
        dict(
            **SMALL,
            num_hidden_layers=3,
            intermediate_size=32,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        {
            "use_sliding_window": {"use_sliding_window": False, "layer_types": None},
            "max_window_layers": {"max_window_layers": 0, "layer_types": None},
        },
    ),
    "qwen3": (
        "qwen3",
        BF16,
        1000,
        dict(hidden_size=32, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"weights of the qk norms": flat_norms("q_norm", "k_norm"), "the q norm": unsharp("q_norm")},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        BF16,
        1100,
        dict(
            hidden_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            head_dim=16,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        {"norm_topk_prob": {"norm_topk_prob": False}, "top 2": {"num_experts_per_tok": 1}},
    ),
    "qwen3_moe_dense_layers": (
        "qwen3_moe",
        F16,
        1200,
        dict(
            hidden_size=32,
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            intermediate_size=48,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        {"no norm_topk_prob": {"norm_topk_prob": True}, "top 2": {"num_experts_per_tok": 1}},
    ),
    "gemma": (
        "gemma",
        BF16,
        1300,
        dict(hidden_size=32, head_dim=32, num_key_value_heads=1, rms_norm_eps=1e-6, rope_parameters=DEFAULT),
        {
            "1 + w": lambda model: [p.data.sub_(1) for n, p in model.named_parameters() if "norm" in n] and None,
            "gelu": {"hidden_act": "silu", "hidden_activation": "silu"},
        },
    ),
    "gemma2": (
        "gemma2",
        BF16,
        1400,
        dict(
            **SMALL,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=1.0,
            query_pre_attn_scalar=24,
            rms_norm_eps=1e-6,
            rope_parameters=DEFAULT,
        ),
        {
            "window": {"sliding_window": 1000},
            "attention softcap": {"attn_logit_softcapping": None},
            "final softcap": {"final_logit_softcapping": None},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 16},
            "post norms": flat_norms("post_"),
            "gelu": {"hidden_activation": "silu"},
        },
    ),
    "gemma3": (
        "gemma3_text",
        BF16,
        1500,
        dict(
            num_hidden_layers=6,
            intermediate_size=32,
            **SMALL,
            num_key_value_heads=1,
            sliding_window=8,
            query_pre_attn_scalar=24,
            rms_norm_eps=1e-6,
            layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
        ),
        {
            "window": {"sliding_window": 1000},
            "pattern": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
            "linear scaling of the global": {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "theta of the local": {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                }
            },
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 16},
            "qk norms": flat_norms("q_norm", "k_norm"),
        },
    ),
    "phi3": (
        "phi3",
        BF16,
        1600,
        dict(
            sliding_window=8,
            tie_word_embeddings=False,
            num_key_value_heads=4,
            original_max_position_embeddings=128,
            rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5},
        ),
        {
            "partial_rotary_factor": {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}},
            "window": {"sliding_window": None},
        },
    ),
    # We choose between the factors once: long, iff the served context is longer than the original. Transformers chooses
    # at each forward, by its length. Here the context is the original: short for both.
    "phi3_longrope_short": (
        "phi3",
        F16,
        1700,
        dict(
            original_max_position_embeddings=128,
            rope_parameters=LONGROPE | {"original_max_position_embeddings": 128},
        ),
        {"short factors": {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}}},
    ),
    # Here transformers computes on more than 32 tokens at once: long for both.
    "phi3_longrope_long": (
        "phi3",
        BF16,
        1800,
        dict(
            original_max_position_embeddings=32,
            rope_parameters=LONGROPE | {"original_max_position_embeddings": 32},
        ),
        {
            "long factors": {
                "rope_parameters": LONGROPE
                | {"original_max_position_embeddings": 32, "long_factor": LONGROPE["short_factor"]}
            },
            "attention factor": {
                "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32, "attention_factor": 1.0}
            },
        },
    ),
    "granite": (
        "granite",
        BF16,
        1900,
        dict(
            embedding_multiplier=3.0,
            logits_scaling=4.0,
            residual_multiplier=0.6,
            attention_multiplier=0.4,
            tie_word_embeddings=False,
            rope_parameters=DEFAULT,
        ),
        {
            "embedding_multiplier": {"embedding_multiplier": 1.0},
            "logits_scaling": {"logits_scaling": 1.0},
            "residual_multiplier": {"residual_multiplier": 1.0},
            "attention_multiplier": {"attention_multiplier": 0.25},
        },
    ),
    "olmo2": (
        "olmo2",
        BF16,
        2000,
        dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters=DEFAULT),
        {
            "weights of the qk norms": flat_norms("q_norm", "k_norm"),
            "the k norm": unsharp("k_norm"),
            "weights of the post norms": flat_norms("post_"),
            "the post norms": unsharp("post_feedforward_layernorm"),
        },
    ),
    "smollm3": (
        "smollm3",
        BF16,
        2100,
        dict(**SMALL, num_hidden_layers=4, intermediate_size=48, no_rope_layer_interval=2, rope_parameters=DEFAULT),
        {
            "no_rope_layer_interval": {"no_rope_layers": [1, 1, 1, 1]},
            "which layers": {"no_rope_layers": [0, 1, 0, 1]},
        },
    ),
    "gpt2": (
        "gpt2",
        F32,
        2200,
        dict(n_embd=32, n_layer=2, n_head=2, n_positions=128, n_inner=None, activation_function="gelu_new"),
        {
            "positions": zero("wpe"),
            "biases": zero(".bias"),
            "gelu_new": {"activation_function": "gelu"},
            "biases of the norms": zero("ln_1.bias", "ln_2.bias", "ln_f.bias"),
        },
    ),
    "llama_sharded": (
        "llama",
        BF16,
        2300,
        dict(**SMALL, tie_word_embeddings=False, rope_parameters=DEFAULT),
        {},
    ),
}
# What GGUF cannot say, and llama.cpp takes for granted: gemma's scale of q is that of the head, each sixth layer of
# gemma3 is global, each fourth of smollm3 is without rope. These are written as GGUF only.
GGUF_ONLY = {
    "gemma2_gguf": FAMILIES["gemma2"][3] | {"query_pre_attn_scalar": 16},
    "gemma3_gguf": FAMILIES["gemma3"][3]
    | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "smollm3_gguf": FAMILIES["smollm3"][3] | {"no_rope_layer_interval": 4},
}
for seed, (name, changes) in enumerate(GGUF_ONLY.items()):
    FAMILIES[name] = (FAMILIES[name.removesuffix("_gguf")][0], F16, 2400 + 100 * seed, changes, {})
GGUF = [
    "llama",
    "llama_llama3_rope",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    *GGUF_ONLY,
    "phi3_longrope_long",
    "granite",
    "olmo2",
    "gpt2",
]
V4 = ["llama_llama3_rope", "gemma3", "phi3", "phi3_longrope_long"]
# gemma's norms multiply by 1 + w.
AROUND_ZERO = {"gemma", "gemma2", "gemma3_text"}
# The two GELUs differ little.
DIFFER_LITTLE = {"gelu_new"}


def make_config(model_type, changes):
    base = {} if model_type == "gpt2" else BASE
    if model_type == "gpt2":
        base = {k: BASE[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
    return AutoConfig.for_model(model_type, **copy.deepcopy(base | changes))


def build(config):
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def randomize(model, seed, dtype):
    """Random weights that can be saved in `dtype` without loss."""
    generator = torch.Generator().manual_seed(seed)
    model_type = model.config.model_type
    hidden = model.config.hidden_size
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or ".ln_" in name:
            if name.endswith("bias"):
                noise = 0.3 * noise
            else:
                noise = (0 if model_type in AROUND_ZERO else 1) + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.5 * noise
        elif "embed_tokens" in name or "wte" in name or "wpe" in name:
            # gemma multiplies embeddings by the square root of the hidden size.
            # Small ones in gemma2, or each token would only repeat itself.
            gemma = (0.3 if model_type == "gemma2" else 0.5) * hidden**-0.5
            noise = noise * (gemma if model_type in AROUND_ZERO else 0.7)
        elif model_type == "gpt2":
            noise = noise * 1.5 / parameter.shape[0] ** 0.5
        else:
            noise = noise * 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = noise.to(dtype).float()


def logits_of(model, tokens, long=False):
    """Logits of each token. `long`: other tokens after them, which they cannot see, make the forward a long one."""
    more = [0] * (START + GREEDY - len(tokens)) if long else []
    return model(torch.tensor([tokens + more]), use_cache=False).logits[0, : len(tokens)]


def greedy(model, start, count, long=False, enough=0.0):
    """Tokens, and the smallest gap between the first and the second logit on the way; ends early if not `enough`."""
    tokens, gap = list(start), float("inf")
    for _ in range(count):
        top = logits_of(model, tokens, long)[-1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
        if gap <= enough:
            break
    return tokens[len(start) :], gap


def seven(x):
    return float(f"{x:.7g}")


def rows(logits):
    return [[seven(x) for x in row] for row in logits.tolist()]


def write_json(path, value):
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def expected_of(tokens, logits, continuation, gap):
    return {
        "transformers": transformers.__version__,
        "tokens": tokens,
        "logits": rows(logits),
        "greedy": continuation,
        "min_gap": seven(gap),
    }


def with_good_seed(model, seed, dtype, long=False):
    """Randomizes until the greedy path is not on a knife's edge, nor one token forever."""
    for seed in range(seed, seed + 100):
        randomize(model, seed, dtype)
        generator = torch.Generator().manual_seed(seed + 50_000)
        tokens = torch.randint(3, VOCAB, (PROMPT,), generator=generator).tolist()
        logits = logits_of(model, tokens, long)
        enough = float(2e-3 * logits.abs().max())
        continuation, gap = greedy(model, tokens[:START], GREEDY, long, enough)
        if gap > enough and len(set(continuation)) >= 12:
            return tokens, logits, continuation, gap
    raise SystemExit("no good seed")


def reloaded(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def write_v4_config(out):
    """The config as transformers 4 wrote it."""
    config = json.loads((out / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.48.0"
    rope = config.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        config["rope_local_base_freq"] = local["rope_theta"]
        types = config.pop("layer_types")
        config["sliding_window_pattern"] = types.index("full_attention") + 1
        del config["_sliding_window_pattern"]
    config["rope_theta"] = rope.pop("rope_theta")
    if config["model_type"] == "phi3":
        partial = rope.pop("partial_rotary_factor")
        # Phi-3's do not have it.
        if partial != 1:
            config["partial_rotary_factor"] = partial
    if rope["rope_type"] == "longrope":
        # It stood beside.
        del rope["original_max_position_embeddings"]
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    (out / "config.v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# Runs beside the converter, whose own gguf package may be newer than ours. The vocabulary is of words "w3", "w4", ..
CONVERT = """
import sys
from pathlib import Path
converter, source, target, kind = sys.argv[1:]
sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
import gguf, torch
from convert_hf_to_gguf import get_model_architecture, get_model_class
from conversion.base import ModelBase, ModelType, TextModel

def words(self):
    count = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, count)])
    self.gguf_writer.add_token_scores([-float(i) for i in range(count)])
    self.gguf_writer.add_token_types([2, 3, 3] + [1] * (count - 3))
    self.gguf_writer.add_unk_token_id(0)
    self.gguf_writer.add_bos_token_id(1)
    self.gguf_writer.add_eos_token_id(2)
    self.gguf_writer.add_add_bos_token(False)

def hparams(directory, is_mistral_format):
    read = load_hparams(directory, is_mistral_format)
    if "n_positions" in read:
        read["n_ctx"] = read["n_positions"]
    return read

load_hparams, ModelBase.load_hparams = ModelBase.load_hparams, staticmethod(hparams)
hparams = ModelBase.load_hparams(Path(source), False)
model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
model.set_vocab = words
# gemma3's wants a tokenizer to see how many rows are of real words: all are.
if "Gemma3" in model.__name__:
    def modify_tensors(self, data, name, bid):
        yield from TextModel.modify_tensors(self, data + self.norm_shift(name), name, bid)
    model.modify_tensors = modify_tensors
kind = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}[kind]
with torch.inference_mode():
    model(Path(source), kind, Path(target), model_name="small random").write()
"""


def convert(out, converter, dtype):
    kind = "f32" if dtype == F32 else "f16"
    target = out / "model.gguf"
    command = [sys.executable, "-c", CONVERT, converter, out, target, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{out.name}: the converter failed:\n{done.stderr}")


def compare_with_llama_cpp(path, server, tokens, logits, continuation):
    """Log probabilities after some prefixes, and the greedy path up to an end of text."""
    url = "http://127.0.0.1:18437"
    command = f"{server} -m {path} --port 18437 -c 128 -np 1 -fa off -ctk f32 -ctv f32 -t 1 --no-warmup"
    process = subprocess.Popen(command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(body):
        body = {"temperature": -1, "return_tokens": True, "cache_prompt": False} | body
        request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except OSError:
                assert process.poll() is None, f"{path}: llama.cpp does not load it"
                time.sleep(0.1)
        worst = 0.0
        for count in (1, 9, 16, 40, 48):
            if count > len(tokens):
                break
            answer = post({"prompt": tokens[:count], "n_predict": 1, "n_probs": VOCAB})
            theirs = {x["id"]: x["logprob"] for x in answer["completion_probabilities"][0]["top_logprobs"]}
            assert len(theirs) == VOCAB
            ours = logits[count - 1].log_softmax(0)
            off = max(abs(float(ours[token]) - logprob) for token, logprob in theirs.items())
            worst = max(worst, off / float(logits.abs().max()))
        theirs = post({"prompt": tokens[:START], "n_predict": GREEDY})["tokens"]
        end = continuation.index(2) if 2 in continuation else GREEDY
        same = next((i for i in range(end) if theirs[i : i + 1] != continuation[i : i + 1]), end)
        print(f"    llama.cpp: logits off by {worst:.1e} of the largest, {same} of {end} greedy tokens are the same")
    finally:
        process.terminate()
        process.wait()


def write(name, args):
    model_type, dtype, seed, changes, switches = FAMILIES[name]
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = build(make_config(model_type, changes))
    long = name == "phi3_longrope_long"
    tokens, logits, continuation, gap = with_good_seed(model, seed, dtype, long)
    scale = logits.abs().max()
    print(f"{name}: largest logit {scale:.3g}, min_gap {gap:.2e}, {len(set(continuation))} tokens of {GREEDY}")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for label, switch in switches.items():
        config = model.config.to_dict()
        if isinstance(switch, dict):
            config |= copy.deepcopy(switch)
        config.pop("model_type")
        other = build(AutoConfig.for_model(model_type, **config))
        other.load_state_dict(state, strict=False)
        if not isinstance(switch, dict):
            switch(other)
        off = float((logits_of(other, tokens, long) - logits).abs().max() / scale)
        print(f"    without {label}: {off:.2g}")
        assert off > (1e-5 if label in DIFFER_LITTLE else 1e-2), f"{name}: {label} does not matter"
    write_json(out / "expected.json", expected_of(tokens, logits, continuation, gap))
    if long:
        # What a server gives that serves no more than the original context.
        short = logits_of(model, tokens[:32])
        brief, gap = greedy(model, tokens[:START], 16)
        off = float((short - logits[:32]).abs().max() / scale)
        print(f"    short instead of long: {off:.2g}; min_gap {gap:.2e}")
        assert gap > 1e-3 * scale and off > 1e-2
        write_json(out / "expected.short.json", expected_of(tokens[:32], short, brief, gap))
    shards = {"max_shard_size": "20KB"} if name == "llama_sharded" else {}
    model.to(dtype).save_pretrained(out, **shards)
    assert torch.equal(logits_of(reloaded(out), tokens, long), logits), f"{name}: the file is another model"
    if name in V4:
        write_v4_config(out)
        with tempfile.TemporaryDirectory() as other:
            shutil.copy(out / "config.v4.json", Path(other) / "config.json")
            shutil.copy(out / "model.safetensors", other)
            off = (logits_of(reloaded(other), tokens, long) - logits).abs().max()
            print(f"    config.v4.json: off by {off:.1e}")
            assert off < 1e-5 * scale
    if name in GGUF and args.converter:
        convert(out, args.converter, dtype)
        if args.server:
            compare_with_llama_cpp(out / "model.gguf", args.server, tokens, logits, continuation)
    if name in GGUF_ONLY:
        for file in ("model.safetensors", "config.json", "generation_config.json"):
            (out / file).unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--server", help="llama.cpp's llama-server")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name in args.only:
        if args.converter or name not in GGUF_ONLY:
            write(name, args)


if __name__ == "__main__":
    main()
