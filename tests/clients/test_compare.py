"""`obol compare` on the real model: the figures are plausible, and its files are what they should be."""

import json
import math
import xml.etree.ElementTree

import harness

# The same file, text and chunk length through the llama-perplexity of llama-cpp-python 0.3.36's llama.cpp.
LLAMA_CPP_FIRST_CHUNK = 24.8037


def test_compare(tmp_path, say):
    prompts, data = tmp_path / "prompts.txt", tmp_path / "data"
    prompts.write_text("What is a coin?\n")
    written, drawn = tmp_path / "all.json", tmp_path / "all.svg"
    result = harness.run(
        "compare",
        harness.model(),
        *("--variants", "file,file", "--chunks", "1", "--prompts", str(prompts), "--answer-tokens", "8"),
        *("--clients", "1,2", "--rounds", "1", "--requests", "1", "--output-tokens", "8"),
        *("--max-perplexity-loss", "0%", "--max-kl", "0"),
        *("--json", str(written), "--svg", str(drawn), "--data-dir", str(data)),
    )
    assert result.returncode == 0, result.stderr
    assert "reference: file, Q4_1 as the file has it" in result.stdout, result.stdout
    figures = json.loads(written.read_text())
    reference, same = figures["variants"]
    perplexity = reference["quality"]["perplexity"]
    say(f"perplexity {perplexity:.4f}, llama.cpp {LLAMA_CPP_FIRST_CHUNK}")
    # Both compute with activations in 8 bits, rounded at different places.
    assert math.isclose(perplexity, LLAMA_CPP_FIRST_CHUNK, rel_tol=0.015)
    assert same["quality"]["perplexity"] == perplexity
    assert same["quality"]["distance"]["kl_max"] == 0
    assert same["answers"] == {"prompts": 1, "same": 1, "equal_tokens": 8}
    for speed in same["speed"]:
        assert speed["prompt_tokens"] == 100 * speed["clients"]
        assert speed["output_tokens"] == 8 * speed["clients"]
        seconds = sum(speed["device_seconds"].values())
        # What the rate card charges for so much device time and hardly any memory: 80 % of 0.10 an hour.
        tokens = speed["prompt_tokens"] + speed["output_tokens"]
        cost = speed["cost_per_million_tokens"] * tokens / 1e6
        assert math.isclose(cost, seconds * 0.08 / 3600, rel_tol=0.01)
    root = xml.etree.ElementTree.parse(drawn).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert any("perplexity lost" in (text.text or "") for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert not list(data.glob("*.db*")), "nothing is written to the ledger"


def test_an_interrupt_leaves_nothing(tmp_path):
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    temporary.mkdir()
    command = ["compare", harness.model(), "--variants", "file,int8", "--only", "quality"]
    where = ["--data-dir", str(data)]
    harness.interrupted(*command, *where, at="perplexity", cwd=tmp_path, TMPDIR=str(temporary))
    assert not list(data.rglob("*")) and not list(temporary.iterdir())
