#!/usr/bin/env python3
"""Makes the small tokenizers under fixtures/tokenizers and the ids that the `tokenizers` library gives with them.

usage: python3 models/tests/make_tokenizers.py

Each NAME/ holds a directory as Hugging Face models come; NAME/expected.json holds texts and their ids: `ids`
without special tokens parsed or added, `parsed` with both. Needs tokenizers (made with 0.23.3). The texts it
learns from are this file and the texts below.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
OUT = HERE / "fixtures" / "tokenizers"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", " \n", "\r\n", "Hello world", " Hello world", "Hello  world ", "Hello\nworld",
    "the tokenizer's tokens aren't the user's; I'LL say we'Ve 'd", "1", "12", "123", "1234567890", "3.14 ÷ 2 = ½ + ²",
    "foo_bar(x)[0] -> {y: 'z'};\n\n\n    return  x\t\t# end  ", "ÄÖÜ äöü ß e\u0301 \u00e9 A\u030a \u212b ﬁ",
    "я помню чудное мгновенье", "日本語のテキスト。中文，没有空格", "한국어 텍스트", "कान्हा नमस्ते", "😶‍🌫️ 🚀🚀 ✅",
    "\u00a0nbsp\u00a0\u3000wide\u2003em", "a▁b ▁ ▁▁", "<s>text</s>", "hi <user> <usr>", "a<user>b <user>  c",
    "<|im_start|>user\nhi<|im_end|>\n", "<0x41><0xE4>", "\u0000\u0001\u007f", "x" * 33, "ab" * 20, "\ufeffbom", "\ud7ff\U0010ffff",
    "...!!!???---===", "a  b   c    d", "CamelCaseWordsAndHTTPServers", "<mask> x <mask>y<mask>", "<s>", " <s> ", "left   <user>   right",
    "مرحبا بالعالم", "don't you're it's DON'T", "  \n  \n  x", "x \n", "e\u0301\u0301 \u1100\u1161\u11a8",
]


def corpus() -> list[str]:
    own = [path.read_text() for path in sorted(HERE.glob("*.py"))]
    return own + [text.encode("utf-8", "ignore").decode() for text in TEXTS] * 2


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def byte_level(pre, normalizer=None, size=420, **model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def then_bytes(*first, use_regex: bool = False, add_prefix_space: bool = False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, last])


def by_chars(normalizer=None, pre=None, size=620, fuse=True) -> Tokenizer:
    """As SentencePiece's: characters, `▁` for a space, bytes for what has no token."""
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    # Learning needs words; encoding has none if the family has none.
    if pre is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    texts = [text for text in corpus() if text.isascii()] + ["日本 я é"]
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator(texts, trainer)
    data = json.loads(tokenizer.to_str())
    if pre is None:
        data["pre_tokenizer"] = None
    # The bytes are plain tokens of the model.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    data["decoder"] = json.loads(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(data))


def around(tokenizer: Tokenizer, before: str = "", after: str = "") -> None:
    names = [name for name in (before, after) if name]
    single = " ".join(part for part in (before, "$A", after) if part)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def all_of_them() -> dict[str, tuple[Tokenizer, dict]]:
    made: dict[str, tuple[Tokenizer, dict]] = {}

    gpt2 = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    gpt2.add_tokens([special("<|endoftext|>")])
    made["gpt2"] = gpt2, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}

    prefixed = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    prefixed.add_tokens([special("<s>"), special("</s>"), special("<mask>", lstrip=True)])
    prefixed.post_processor = processors.RobertaProcessing(
        ("</s>", prefixed.token_to_id("</s>")), ("<s>", prefixed.token_to_id("<s>"))
    )
    made["prefix-space"] = prefixed, {"bos_token": "<s>", "eos_token": "</s>"}

    llama3 = byte_level(then_bytes(split(LLAMA3)), ignore_merges=True)
    llama3.add_tokens([special("<s>"), special("<|eot_id|>")])
    llama3.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", llama3.token_to_id("<s>"))]),
        ]
    )
    made["llama3"] = llama3, {"bos_token": "<s>", "eos_token": "<|eot_id|>"}

    qwen2 = byte_level(then_bytes(split(QWEN2)), normalizers.NFC())
    qwen2.add_tokens([special("<|im_start|>"), special("<|im_end|>"), AddedToken("<user>", normalized=False)])
    made["qwen2"] = qwen2, {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": False}

    cl100k = byte_level(then_bytes(split(CL100K, "removed", True)))
    cl100k.add_tokens([special("<s>", rstrip=True), special("<|im_end|>", single_word=True)])
    made["cl100k"] = cl100k, {"eos_token": "<|im_end|>"}

    made["o200k"] = byte_level(then_bytes(split(O200K))), {}

    deepseek = byte_level(
        then_bytes(split(r"\p{N}{1,3}"), split(r"[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK3)), normalizers.Sequence([])
    )
    deepseek.add_tokens([special("<s>"), AddedToken("<user>", lstrip=True, rstrip=True, normalized=True)])
    made["deepseek"] = deepseek, {"bos_token": {"content": "<s>"}}

    made["smollm"] = byte_level(then_bytes(pre_tokenizers.Digits(individual_digits=True), use_regex=True)), {}

    falcon = byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                split("[0-9][0-9][0-9]"),
            ]
        )
    )
    made["falcon"] = falcon, {}

    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama2 = by_chars(prepend)
    around(llama2, "<s>")
    made["llama2"] = llama2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

    phi3 = by_chars(prepend)
    phi3.add_tokens([special("<|im_start|>", rstrip=True), special("<|im_end|>", rstrip=True)])
    phi3.add_tokens([AddedToken("<user>", normalized=True), AddedToken("<usr>", normalized=True, lstrip=True)])
    around(phi3, "<s>", "</s>")
    made["phi3"] = phi3, {"bos_token": "<s>", "eos_token": "<|im_end|>"}

    gemma = by_chars(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))
    gemma.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False), special("<mask>")])
    made["gemma"] = gemma, {"bos_token": "<s>", "eos_token": "</s>"}

    first = by_chars(None, pre_tokenizers.Metaspace("▁", "first", split=False))
    first.add_tokens([AddedToken("<user>", normalized=False)])
    around(first, "<s>")
    made["metaspace-first"] = first, {"bos_token": "<s>", "eos_token": "</s>"}

    always = by_chars(None, pre_tokenizers.Metaspace("▁", "always", split=True))
    always.add_tokens([AddedToken("<user>", normalized=False, single_word=True)])
    made["metaspace-always"] = always, {"bos_token": "<s>", "eos_token": "</s>"}

    # Without bytes to fall back on: unknown characters are fused or not.
    for name, fuse in (("unknown-fused", True), ("unknown-single", False)):
        data = json.loads(by_chars(normalizers.Replace(" ", "▁"), fuse=fuse).to_str())
        data["model"]["byte_fallback"] = False
        made[name] = Tokenizer.from_str(json.dumps(data)), {"eos_token": "</s>"}
    return made


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The same, blind for special tokens and adding none."""
    blind = Tokenizer.from_str(tokenizer.to_str())
    blind.encode_special_tokens = True
    return blind


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[dict]:
    blind = plain(tokenizer)
    rows = []
    for text in texts:
        row = {"text": text, "ids": blind.encode(text, add_special_tokens=False).ids}
        parsed = tokenizer.encode(text, add_special_tokens=True).ids
        # Ours does not double a beginning that the text has already.
        own = tokenizer.encode(text, add_special_tokens=False).ids
        if own and tokenizer.id_to_token(own[0]) == "<s>" and parsed[: len(own) + 1] == [own[0], *own]:
            parsed = parsed[1:]
        if parsed != row["ids"]:
            row["parsed"] = parsed
        rows.append(row)
    return rows


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    parts = [*"aeinrst'sdmlvABX019²½._-/!?#<>{}\"", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "▁", "é", "e\u0301"]
    parts += ["the", "tion", "self", "'ll", "'RE", "日", "本語", "я", "ß", "한", "ا", "न्", "🚀", "\u200d", "<s>", "</s>", "<user>", "<usr>"]
    parts += ["<mask>", "<|im_end|>", "<|im_start|>", "<0x41>", "\u0000", "\ufffd", "ǅ", "Σ", "İ", "\u2028", "ﬁ", "①", "٣", "\U00020000"]
    return ["".join(rng.choice(parts) for _ in range(rng.randint(1, 24))) for _ in range(count)]


def main() -> None:
    # `fuzz N SEED DIRECTORY`: as many random texts, written elsewhere.
    fuzz = len(sys.argv) == 5 and sys.argv[1] == "fuzz"
    out = Path(sys.argv[4]) if fuzz else OUT
    texts = random_texts(int(sys.argv[3]), int(sys.argv[2])) if fuzz else [t for t in TEXTS if "\ud7ff" not in t]
    shutil.rmtree(out, ignore_errors=True)
    for name, (tokenizer, config) in all_of_them().items():
        directory = out / name
        directory.mkdir(parents=True)
        (directory / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n")
        (directory / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
        rows = ",\n".join(json.dumps(row, ensure_ascii=True) for row in expected(tokenizer, texts))
        (directory / "expected.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
