#!/usr/bin/env python3
"""What encoders must give, computed without the product: numpy 2.4.6, tokenizers 0.23.3, safetensors 0.8.0.

    python3 models/tests/make_encoder.py tiny       models/tests/fixtures/encoder: a small random BERT, and its answers
    python3 models/tests/make_encoder.py real DIR   tests/golden/minilm.json: those of all-MiniLM-L6-v2 in DIR

Products and sums are done in 64 bits.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tests" / "fixtures" / "encoder"
GOLDEN = ROOT / "tests" / "golden" / "minilm.json"
VERSIONS = "numpy 2.4.6, tokenizers 0.23.3, safetensors 0.8.0"

TEXTS = [
    "The cat sits on the mat.",
    "A kitten rests on a rug.",
    "The quarterly budget was approved by the board.",
    "Crème brûlée, naïve façade, ÅNGSTRÖM; ΣΊΣΥΦΟΣ, İstanbul straße",
    "tabs\tand\nnew lines \u00a0and\u3000wide  blanks\u200band zero\u0000width\ufffd ones\u00ad",
    "don't stop: [SEP] (e.g. 3.14 % of $100) – “quoted” … ¿qué? #hash @you a_b ~^`|",
    "東京タワーは高い。漢字kanji混ざる 한국어 ไทย हिन्दी العربية עברית",
    "unaffable unaffables re-unaffable 2024-11-22 12345678901234567890",
    "emoji 🙂👍🏽 and 𝔪𝔞𝔱𝔥 ﬁ ½ ™",
    "x" * 101 + " " + "y" * 100,
    "a",
    "   ",
]


def erf(x):
    return np.vectorize(math.erf)(x)


def norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


def vector(weights, config, ids):
    """The mean of the last layer's rows, of length 1."""
    w = {name: value.astype(np.float64) for name, value in weights.items() if value.dtype != np.int64}
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    n, width = len(ids), config["hidden_size"]
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][:n] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"], eps)
    for layer in range(config["num_hidden_layers"]):

        def linear(x, name, at=f"encoder.layer.{layer}."):
            return x @ w[f"{at}{name}.weight"].T + w[f"{at}{name}.bias"]

        def normed(x, name, at=f"encoder.layer.{layer}."):
            return norm(x, w[f"{at}{name}.weight"], w[f"{at}{name}.bias"], eps)

        parts = (linear(x, f"attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.reshape(n, heads, -1).transpose(1, 0, 2) for part in parts)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(width // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        seen = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, width)
        x = normed(x + linear(seen, "attention.output.dense"), "attention.output.LayerNorm")
        wide = linear(x, "intermediate.dense")
        wide = wide * 0.5 * (1 + erf(wide / math.sqrt(2)))
        x = normed(x + linear(wide, "output.dense"), "output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def cases(directory, texts, longest):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Names of special tokens inside a text are plain text to the server.
    tokenizer.encode_special_tokens = True
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    for text in texts:
        ids = tokenizer.encode(text).ids
        case = {"text": text, "ids": ids}
        if len(ids) <= longest:
            case["vector"] = [round(float(x), 7) for x in vector(weights, config, ids)]
        yield case


def write(path, found):
    lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in found)
    path.write_text(f'{{"made_with": "{VERSIONS}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def tiny():
    words = "the cat on mat un aff able stop and a kitten sits quarterly 12 34 hash".split()
    pieces = [*words, *"abcdefghijklmnopqrstuvwxyz0123456789", *".,:;!?()[]-_'\"#$%@…–“”東京高い漢"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab += list(dict.fromkeys(pieces + [f"##{piece}" for piece in pieces if piece.isalnum()]))
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": len(vocab),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    random = np.random.default_rng(7)
    weights = {}

    def make(name, *shape, around=0.0, spread=0.3):
        weights[name] = (around + spread * random.standard_normal(shape)).astype(np.float32)

    width, wide = config["hidden_size"], config["intermediate_size"]
    for kind, rows in (("word", len(vocab)), ("position", 64), ("token_type", 2)):
        make(f"embeddings.{kind}_embeddings.weight", rows, width)

    def make_norm(name):
        make(f"{name}.weight", width, around=1.0)
        make(f"{name}.bias", width)

    make_norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for name, n, k in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", wide, width),
            ("output.dense", width, wide),
        ):
            make(f"{at}{name}.weight", n, k)
            make(f"{at}{name}.bias", n)
        make_norm(f"{at}attention.output.LayerNorm")
        make_norm(f"{at}output.LayerNorm")
    (TINY / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (TINY / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (TINY / "sentence_bert_config.json").write_text('{"max_seq_length": 48}\n')
    modes = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (TINY / "1_Pooling" / "config.json").write_text(json.dumps(modes) + "\n")
    special = [
        {"id": id, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for id, text in enumerate(vocab[:5])
    ]
    template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*template, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [*template, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "special_tokens": {
                name: {"id": name, "ids": [id], "tokens": [name]} for id, name in ((2, "[CLS]"), (3, "[SEP]"))
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {text: id for id, text in enumerate(vocab)},
        },
    }
    (TINY / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(weights, TINY / "model.safetensors")
    write(TINY / "expected.json", cases(TINY, TEXTS, 48))


def main():
    match sys.argv[1:]:
        case ["tiny"]:
            tiny()
        case ["real", directory]:
            write(GOLDEN, cases(Path(directory), TEXTS, 256))
        case _:
            sys.exit(__doc__.strip())


if __name__ == "__main__":
    main()
