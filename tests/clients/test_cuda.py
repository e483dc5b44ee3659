"""A CUDA build: on a device, real or emulated, and on machines without one. Run by scripts/cuda-test."""

import os
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest

pytestmark = pytest.mark.cuda

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
# What a machine without an NVIDIA driver looks like to the program.
NO_DRIVER = {"LD_LIBRARY_PATH": ""}
CONTEXT = ("--max-model-len", "512")
TEXTS = [
    "The first coins were made of",
    "A ledger is",
    "def add(a, b):",
    "Once upon a time there was a little server that",
    "1 2 3 4 5",
]

emulated = pytest.mark.skipif("OBOL_TEST_EMULATED" not in os.environ, reason="needs the emulator's knobs")


def chat(text: str, **fields) -> dict:
    return {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def continued(server: harness.Server, text: str, tokens: int = 12, **fields) -> dict:
    """A completion with log-probabilities, its cost apart."""
    fields = {"temperature": 0, "max_tokens": tokens, "logprobs": 5, "ignore_eos": True, **fields}
    return server.ok(COMPLETE, {"model": "default", "prompt": text, **fields})["choices"][0]


def on(start, device: str, *flags: str, **environment: str) -> harness.Server:
    return start(*CONTEXT, "--device", device, *flags, **environment)


def failure(tmp_path, *flags: str, **environment: str) -> str:
    """What a start that must fail says."""
    arguments = ("serve", "--model", harness.model(), "--data-dir", str(tmp_path / "data"), "--listen", "127.0.0.1:0")
    result = harness.run(*arguments, *flags, **environment)
    assert result.returncode == 1, result
    assert "panicked" not in result.stderr, result.stderr
    return result.stderr


def test_without_a_driver_auto_serves_on_the_cpu(start):
    server = on(start, "auto", **NO_DRIVER)
    assert "computing on the CPU: no NVIDIA driver" in server.log()
    answer = server.post(CHAT, chat("Hello"))
    assert answer.status == 200 and answer.headers["x-obol-device"] == "cpu"
    server.audit()


def test_without_a_driver_a_cuda_device_is_a_clear_error(tmp_path):
    said = failure(tmp_path, "--device", "cuda:0", **NO_DRIVER)
    assert "no NVIDIA driver" in said and "--device cpu" in said


def test_a_device_that_is_not_there(tmp_path):
    said = failure(tmp_path, "--device", "cuda:17")
    assert "cuda:17" in said and ("cuda:0" in said or "1 CUDA device" in said)


@emulated
def test_an_old_driver_is_named_with_what_is_needed(tmp_path):
    said = failure(tmp_path, "--device", "cuda:0", OBOL_EMULATOR_DRIVER_VERSION="12040")
    assert "12.4" in said and "13.0" in said


@emulated
@pytest.mark.parametrize("megabytes", [4, 16, 24])
def test_a_device_too_small_says_what_to_do(tmp_path, megabytes):
    said = failure(tmp_path, "--device", "cuda:0", OBOL_EMULATOR_MEMORY_MB=str(megabytes))
    assert any(hint in said for hint in ("--quant", "--step-tokens", "--kv-memory", "smaller model")), said


@emulated
def test_a_small_device_serves_with_fewer_blocks(start):
    """Enough for weights and steps, and for the KV of a few sequences: a crowd is preempted, nothing is lost."""
    server = on(start, "cuda:0", "--step-tokens", "64", "--max-sequences", "16", OBOL_EMULATOR_MEMORY_MB="52")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: continued(server, TEXTS[i % 5] * 8, 40, seed=i), range(8)))
    assert all(answer["finish_reason"] == "length" for answer in answers)
    server.wait_idle()
    server.audit()


@pytest.mark.parametrize(("quant", "tie"), [("f32", 1e-3), ("file", 0.2)])
def test_greedy_tokens_are_the_cpus_in_f32(start, quant, tie):
    """The same tokens, or another one where the CPU's best two are as good as equal. With the file's int4 weights
    activations are rounded to int8, and a last bit decides to which side."""
    cpu = on(start, "cpu", "--quant", quant)
    cuda = on(start, "cuda:0", "--quant", quant, "--dtype", "f32")
    for text in TEXTS:
        theirs, ours = (continued(server, text)["logprobs"] for server in (cpu, cuda))
        for at, (expected, token) in enumerate(zip(theirs["tokens"], ours["tokens"], strict=True)):
            if token != expected:
                top = theirs["top_logprobs"][at]
                assert top[expected] - top.get(token, -100) < tie, f"{text!r}: {token!r} for {expected!r}"
                break
            assert abs(theirs["token_logprobs"][at] - ours["token_logprobs"][at]) < tie
    assert cuda.post(CHAT, chat("Hello")).headers["x-obol-device"] == "cuda:0"


@pytest.mark.parametrize("kv", ["f16", "bf16", "int8"])
def test_graphs_company_and_chunks_change_no_bit(start, kv):
    """Log-probabilities, too, are the same: recorded or not, alone or in a crowd, in whatever chunks."""
    plain = on(start, "cuda:0", "--cuda-graphs", "false", "--kv-dtype", kv)
    graphs = on(start, "cuda:0", "--kv-dtype", kv, "--step-tokens", "64")
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7, "frequency_penalty": 0.3}
    work = [(text * repeat, fields) for text in TEXTS[:3] for repeat in (1, 12) for fields in ({}, sampled)]
    alone = [continued(plain, text, **fields) for text, fields in work]
    with ThreadPoolExecutor(len(work)) as pool:
        crowd = list(pool.map(lambda job: continued(graphs, job[0], **job[1]), work))
    assert crowd == alone
    for server in (plain, graphs):
        server.wait_idle()
        server.audit()


def test_the_books_hold_through_cancels_and_a_kill(start):
    server = on(start, "cuda:0")
    streams = [server.stream(CHAT, chat("Count.", max_tokens=300, ignore_eos=True)) for _ in range(3)]
    for stream in streams:
        next(stream.events())
    streams[0].close()
    whole = server.ok(CHAT, chat("Hello", logit_bias={"20": 5}, min_tokens=4, presence_penalty=0.5, n=2))
    assert len(whole["choices"]) == 2
    server.kill()
    server.start()
    server.ok(CHAT, chat("Hello again"))
    assert server.stop() == 0
    assert "difference 0" in server.audit()


def test_metrics_show_the_device(start):
    server = on(start, "cuda:0")
    server.ok(CHAT, chat("Hello"))
    metrics = server.wait_idle()
    assert metrics.total("obol_device_memory_total_bytes") >= metrics.total("obol_device_memory_used_bytes") > 0
    assert metrics.total("obol_device_energy_joules_total") > 0
    assert 0 <= metrics.total("obol_device_busy_ratio") <= 1
    assert metrics.total("obol_ledger_conservation_error_ns") == 0


def test_receipts_have_their_part_of_the_devices_energy(start):
    server = on(start, "cuda:0")
    before = server.metrics().total("obol_device_energy_joules_total")
    parts = [server.ok(CHAT, chat("Count.", max_tokens=30, ignore_eos=True)) for _ in range(3)]
    millijoules = [answer["usage"]["obol"]["energy_mj"] for answer in parts]
    assert all(part > 0 for part in millijoules), millijoules
    metrics = server.wait_idle()
    used = round((metrics.total("obol_device_energy_joules_total") - before) * 1000)
    assert sum(millijoules) <= used
    assert round(metrics.total("obol_energy_joules_total") * 1000) == sum(millijoules)
    receipt = server.get(f"/v1/requests/{parts[0]['usage']['obol']['request_id']}").json()
    assert receipt["energy_mj"] == millijoules[0], "as it is in the ledger"
