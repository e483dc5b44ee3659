#!/usr/bin/env python3
"""Writes greedy.json: what llama.cpp generates greedily from 20 prompts, as token ids.

    python3 tests/golden/make_greedy.py --server PATH/llama-server --model FILE.gguf

One slot, no prompt cache, temperature 0, 64 tokens or the model's end. For each position the two most
likely tokens and the gap between their log-probabilities are kept too: where two implementations part,
a small gap tells a near-tie from a mistake. llama.cpp comes from its own build, made outside this
repository (`-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF`, target llama-server).
Rerun it when the default model changes; the file's head says what made it.
"""

import argparse
import hashlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TOKENS = 64

CHAT = [
    "What is the capital of France, and what is it known for?",
    "Explain to a ten-year-old why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it line by line.",
    "List five things to pack for a week in the mountains in winter.",
    "A train leaves at 9:40 and arrives at 13:25. How long is the journey? Show the steps.",
    "Translate into French: The weather is nice today and we are going to the beach.",
    "Was ist der Unterschied zwischen einem Gletscher und einem Eisberg?",
    "Give me three titles for a short story about a lighthouse keeper 🌊🗼 and a lost dog 🐕.",
    "Summarise in two sentences: The printing press made books cheap, spread ideas quickly, and helped "
    "more people learn to read. It changed religion, science and politics within a century.",
    "用中文介绍一下你自己。",
]

RAW = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "Once upon a time, in a village at the edge of a great forest,",
    'def quicksort(items):\n    """Sort a list of numbers."""\n',
    "SELECT customers.name, COUNT(orders.id)\nFROM customers\n",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "12345 foo_bar\n\n  x",
    "The derivative of x^2 + 3x - 5 with respect to x is",
    '{"name": "Ada", "born": 1815, "languages": [',
    "Les enfants mangèrent du pain et de la confiture, puis ils sortirent dans le jardin où",
    "Ёлка стоит в углу комнаты — naïve café, 10 € or £9; temperatures of −5 °C to 30 °C.\nIn short:",
]


class Server:
    """llama-server on a free port, one sequence at a time."""

    def __init__(self, program: str, model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.flags = ["--parallel", "1", "--ctx-size", "4096", "--threads", "1", "--cache-ram", "0"]
        command = [program, "--model", model, "--host", "127.0.0.1", "--port", str(self.port), *self.flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"the server stopped with {self.process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        sys.exit("the server was not ready within two minutes")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(30)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def near_ties(answer: dict) -> list[list | None]:
    """[second id, gap] for every generated position; null where llama.cpp reports no probabilities
    (it leaves out tokens that end inside a character)."""
    reported = iter(answer["completion_probabilities"])
    position = next(reported, None)
    rows: list[list | None] = []
    for token in answer["tokens"]:
        if position is None or position["id"] != token:
            rows.append(None)
            continue
        first, second = position["top_logprobs"][:2]
        assert first["id"] == token, "greedy takes the most likely token"
        rows.append([second["id"], round(first["logprob"] - second["logprob"], 3)])
        position = next(reported, None)
    return rows


def run(server: Server, text: str) -> dict:
    prompt = server.tokenize(text)
    answer = server.post(
        "/completion",
        {
            "prompt": prompt,
            "n_predict": TOKENS,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
            "n_probs": 2,
            "seed": 1,
        },
    )
    output, second = answer["tokens"], near_ties(answer)
    ended = answer["stop_type"] == "eos"
    assert len(output) == TOKENS or ended, (len(output), answer["stop_type"])
    if ended:
        # llama.cpp reports the end token too; it is no part of the text.
        output, second = output[:-1], second[:-1]
    print(f"{len(prompt):4} -> {len(output):2} {answer['content'][:60]!r}", file=sys.stderr)
    return {"ids": prompt, "output": output, "ended": ended, "second": second, "text": answer["content"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--server", required=True, help="the llama-server program")
    arguments.add_argument("--model", required=True, help="the default model's GGUF file")
    arguments.add_argument("--out", default=Path(__file__).with_name("greedy.json"), type=Path)
    given = arguments.parse_args()

    version = subprocess.run([given.server, "--version"], capture_output=True, text=True, check=True)
    version_lines = (version.stdout + version.stderr).strip().splitlines()
    cases = []
    with Server(given.server, given.model) as server:
        for message in CHAT:
            messages = [{"role": "user", "content": message}]
            rendered = server.post("/apply-template", {"messages": messages})["prompt"]
            cases.append({"messages": messages, "rendered": rendered, **run(server, rendered)})
        for text in RAW:
            cases.append({"prompt": text, **run(server, text)})
        flags = server.flags
    head = {
        "made_by": "tests/golden/make_greedy.py",
        "llama_cpp": [line for line in version_lines if line.startswith(("version", "built"))],
        "flags": flags,
        "request": {"n_predict": TOKENS, "temperature": 0, "cache_prompt": False},
        "model": Path(given.model).name,
        "model_sha256": hashlib.sha256(Path(given.model).read_bytes()).hexdigest(),
    }
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    given.out.write_text(
        f'{{"head":{json.dumps(head, indent=1)},\n"cases":[\n{lines}\n]}}\n', encoding="utf-8"
    )
    smallest = min(row[1] for case in cases for row in case["second"] if row)
    print(
        f"{len(cases)} cases, {sum(len(c['output']) for c in cases)} tokens, smallest gap {smallest}: {given.out}"
    )


if __name__ == "__main__":
    main()
