"""What cannot start says why, in one clear message, with the right exit code: 1 failed, 2 usage."""

import os
import socket
import struct
from pathlib import Path

import harness
import pytest


def fails(tmp_path: Path, *flags: str, code: int | None = None, model: str | None = None) -> str:
    """Runs `obol serve` and expects it to give up, by default with 1 or 2; what it said."""
    data = [] if "--data-dir" in flags else ["--data-dir", str(tmp_path / "data")]
    listen = [] if "--listen" in flags else ["--listen", f"127.0.0.1:{harness.free_port()}"]
    result = harness.run("serve", "--model", model or harness.model(), *data, *listen, *flags)
    said = result.stdout + result.stderr
    assert result.returncode in ((1, 2) if code is None else (code,)), (result.returncode, said)
    assert "panicked" not in said and "RUST_BACKTRACE" not in said, said
    return said


def truncated(tmp_path: Path, keep: int) -> str:
    path = tmp_path / "truncated.gguf"
    with open(harness.model(), "rb") as whole:
        path.write_bytes(whole.read(keep))
    return str(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 5_000, 1_000_000, 50_000_000])
def test_a_truncated_model_file(tmp_path, keep):
    assert "truncated.gguf" in fails(tmp_path, code=1, model=truncated(tmp_path, keep))


def gguf(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = 1 << 60
ABSURD = {
    "not a model": b"MZ\x90\x00" + bytes(100),
    "no version known": b"GGUF" + struct.pack("<IQQ", 999, 0, 0),
    "tensors past counting": gguf(HUGE, 0),
    "metadata past counting": gguf(0, HUGE),
    "a key of an exabyte": gguf(0, 1, struct.pack("<Q", HUGE) + b"abc"),
    "an array of an exabyte": gguf(0, 1, text(b"tokens") + struct.pack("<IIQ", 9, 4, HUGE)),
    "an array inside arrays": gguf(0, 1, text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "a type past the list": gguf(0, 1, text(b"a") + struct.pack("<I", 77)),
    "a tensor of an exabyte": gguf(
        1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 28, 0, 0) + bytes(64)
    ),
    "dimensions that overflow": gguf(
        1, 0, text(b"t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0) + bytes(64)
    ),
    "more dimensions than any": gguf(1, 0, text(b"t") + struct.pack("<I", 1 << 30)),
    "an offset past the end": gguf(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 0, HUGE) + bytes(64)),
    "nothing in it": gguf(0, 0, bytes(64)),
    "layers past counting": gguf(
        0,
        2,
        text(b"general.architecture")
        + struct.pack("<I", 8)
        + text(b"llama")
        + text(b"llama.block_count")
        + struct.pack("<II", 4, 0xFFFFFFFF)
        + bytes(64),
    ),
}


@pytest.mark.parametrize("content", ABSURD.values(), ids=ABSURD.keys())
def test_an_absurd_model_file(tmp_path, content):
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content)
    assert "absurd.gguf" in fails(tmp_path, code=1, model=str(path))


def test_a_model_file_that_is_not_there(tmp_path):
    path = tmp_path / "nothing.gguf"
    assert str(path) in fails(tmp_path, model=str(path))


def test_a_model_that_nobody_knows(tmp_path):
    said = fails(tmp_path, model="no-such-model")
    assert "no-such-model" in said


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in fails(tmp_path, "--listen", address, code=1)


def test_a_data_directory_that_cannot_be_written(tmp_path):
    """Below a file: not even root can make a folder there."""
    (tmp_path / "file").write_text("in the way")
    path = str(tmp_path / "file" / "data")
    assert path in fails(tmp_path, "--data-dir", path, code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_data_directory_without_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert str(locked) in fails(tmp_path, "--data-dir", str(locked))


def test_a_data_directory_in_use(start, tmp_path):
    own = start("--max-model-len", "512")
    assert str(own.data_dir) in fails(tmp_path, "--data-dir", str(own.data_dir), code=1)
    assert own.alive()
    own.ok("/v1/completions", {"model": "default", "prompt": "A", "max_tokens": 1})


def test_an_open_address_needs_to_be_asked_for(tmp_path):
    result = harness.run(
        "serve", "--model", harness.model(), "--data-dir", str(tmp_path / "data"), "--listen", "0.0.0.0:0"
    )
    assert result.returncode in (1, 2)
    assert "--insecure-open" in result.stdout + result.stderr


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--max-model-len", "many"], ["--listen", "nowhere"]])
def test_wrong_usage(tmp_path, flags):
    fails(tmp_path, *flags, code=2)


@pytest.mark.parametrize("command", [[], ["serve"], ["pull"], ["report"], ["audit"]])
def test_every_command_has_help(command):
    result = harness.run(*command, "--help")
    assert result.returncode == 0 and "Usage" in result.stdout


def test_audit_and_report_without_a_ledger(tmp_path):
    for command in ("audit", "report"):
        result = harness.run(command, "--data-dir", str(tmp_path / "none"))
        assert result.returncode == 1, result.stdout
        assert str(tmp_path / "none") in result.stdout + result.stderr
