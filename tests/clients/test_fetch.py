"""`obol pull` on a machine that has nothing: fetched once, checked, and a clear way on without a source."""

import hashlib
import json
from pathlib import Path

import harness

NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


def home(tmp_path: Path) -> dict[str, str]:
    """A user who has never run the program."""
    return {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_pull_fetches_once_and_checks(tmp_path):
    first = harness.run("pull", "--json", timeout=600, **home(tmp_path))
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert digest(found["path"]) == digest(harness.model())
    assert Path(found["path"]).is_relative_to(tmp_path)
    # Now without any source: neither hub nor Python.
    again = harness.run("pull", "--json", **home(tmp_path), HF_ENDPOINT=NOWHERE, PATH=str(tmp_path))
    assert again.returncode == 0 and json.loads(again.stdout) == found, again.stderr


def test_without_a_source_it_says_where_to_put_the_file(tmp_path):
    result = harness.run("pull", **home(tmp_path), HF_ENDPOINT=NOWHERE, PATH=str(tmp_path))
    assert result.returncode == 1, result.stdout
    assert "python3" in result.stderr and "sha256" in result.stderr, result.stderr
    assert str(tmp_path) in result.stderr and ".gguf" in result.stderr, result.stderr
    assert not list(tmp_path.rglob("*.gguf")), "what is not whole has not the file's name"
