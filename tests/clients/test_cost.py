"""What a request cost: one figure, the same in headers, body, trailers, API, report and audit."""

import json
import re
import socket
from decimal import Decimal

import harness
import pytest

HELLO = [{"role": "user", "content": "Say hello to the sea."}]

COST_HEADERS = [
    "x-obol-gpu-seconds",
    "x-obol-kv-byte-seconds",
    "x-obol-kv-peak-bytes",
    "x-obol-cached-tokens",
    "x-obol-cost",
    "server-timing",
]
FIRST_HEADERS = ["x-request-id", "x-obol-device", "x-obol-currency"]

RECEIPT = {
    "request_id",
    "client_request_id",
    "created",
    "model",
    "precision",
    "device",
    "key_id",
    "tenant",
    "tags",
    "status",
    "seed",
    "tokens",
    "gpu_seconds",
    "device_ns",
    "steps",
    "kv_byte_seconds",
    "kv_peak_bytes",
    "queue_seconds",
    "ttft_seconds",
    "wall_seconds",
    "cost",
    "lines",
    "method_id",
    "saved",
    "energy_mj",
}


def check_receipt(receipt: dict) -> None:
    """Everything that holds inside one receipt."""
    assert RECEIPT <= set(receipt), RECEIPT - set(receipt)
    assert {"prompt", "cached", "completion", "draft_accepted", "draft_rejected"} <= set(receipt["tokens"])
    device = {name: int(value) for name, value in receipt["device_ns"].items()}
    assert device["total"] == device["prefill"] + device["decode"] > 0
    assert receipt["gpu_seconds"] == f"{device['total'] // 10**9}.{device['total'] % 10**9:09}"
    cost = receipt["cost"]
    for part in ("total", "time", "memory", "cap_overrun"):
        assert re.fullmatch(r"\d+\.\d{12}", cost[part]), cost
    assert Decimal(cost["total"]) == Decimal(cost["time"]) + Decimal(cost["memory"])
    assert Decimal(cost["cap_overrun"]) == 0
    assert Decimal(cost["total"]) > 0 and cost["currency"]
    assert receipt["lines"], "at least one line a receipt"
    assert {"prefix_cache", "batching"} <= set(receipt["saved"])
    assert receipt["method_id"]


def check_headers(headers, receipt: dict) -> None:
    """The headers (or trailers) print the receipt."""
    assert headers["x-obol-gpu-seconds"] == receipt["gpu_seconds"]
    assert headers["x-obol-kv-byte-seconds"] == receipt["kv_byte_seconds"]
    assert headers["x-obol-kv-peak-bytes"] == str(receipt["kv_peak_bytes"])
    assert headers["x-obol-cached-tokens"] == str(receipt["tokens"]["cached"])
    assert headers["x-obol-cost"] == receipt["cost"]["total"]
    if receipt["cost"]["currency"] == "USD":
        assert Decimal(headers["x-litellm-response-cost"]) == Decimal(receipt["cost"]["total"])
    timing = headers["server-timing"]
    for part in ("queue;dur=", "prefill;dur=", "decode;dur=", "gpu;dur="):
        assert part in timing, timing


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_headers_body_and_record_are_one(client, server, name, endpoint):
    if endpoint == "chat":
        raw = client.chat.completions.with_raw_response.create(model=name, messages=HELLO, max_tokens=8)
    else:
        raw = client.completions.with_raw_response.create(model=name, prompt="The sea", max_tokens=8, n=2)
    for header in FIRST_HEADERS + COST_HEADERS:
        assert raw.headers.get(header), f"{header} is missing: {sorted(raw.headers)}"
    body = json.loads(raw.text)
    receipt = body["usage"]["obol"]
    check_receipt(receipt)
    check_headers(raw.headers, receipt)
    assert raw.headers["x-request-id"] == receipt["request_id"]
    assert raw.headers["x-obol-currency"] == receipt["cost"]["currency"]
    assert raw.headers["x-obol-device"] == receipt["device"]
    assert body["usage"]["cost"] == pytest.approx(float(receipt["cost"]["total"]), rel=1e-12)
    assert body["usage"]["prompt_tokens"] == receipt["tokens"]["prompt"]
    assert body["usage"]["completion_tokens"] == receipt["tokens"]["completion"]
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == receipt["tokens"]["cached"]
    assert server.receipt(receipt["request_id"]) == receipt


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_last_chunk_of_a_stream_carries_the_receipt(client, server, name, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(
        client.chat.completions.create(model=name, messages=HELLO, max_tokens=8, stream=True, **options)
    )
    last = chunks[-1].to_dict()
    receipt = last["usage"]["obol"]
    check_receipt(receipt)
    assert last["usage"]["cost"] == pytest.approx(float(receipt["cost"]["total"]), rel=1e-12)
    assert bool(last["choices"]) != include_usage
    assert server.receipt(receipt["request_id"]) == receipt


def read_chunked(stream) -> tuple[bytes, dict[str, str]]:
    """Body and trailers of a chunked answer."""
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        assert stream.readline() == b"\r\n"
    trailers = {}
    while (line := stream.readline().decode().strip()) != "":
        name, value = line.split(":", 1)
        trailers[name.lower()] = value.strip()
    return body, trailers


@pytest.mark.parametrize("asked", [True, False])
def test_trailers_of_a_stream(server, name, asked):
    body = json.dumps({"model": name, "messages": HELLO, "max_tokens": 4, "stream": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n" + ("te: trailers\r\n" if asked else "") + "\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        stream = connection.makefile("rb")
        assert b"200" in stream.readline()
        headers = {}
        while (line := stream.readline().decode().strip()) != "":
            field, value = line.split(":", 1)
            headers[field.lower()] = value.strip()
        for header in FIRST_HEADERS:
            assert headers.get(header), headers
        assert headers["transfer-encoding"] == "chunked"
        text, trailers = read_chunked(stream)
    assert text.rstrip().endswith(b"data: [DONE]")
    if not asked:
        assert trailers == {}
        return
    receipt = server.receipt(headers["x-request-id"])
    check_headers(trailers, receipt)


def test_errors_carry_the_first_headers(server, name):
    answer = server.post("/v1/chat/completions", {"model": name, "messages": []})
    assert answer.status == 400
    for header in FIRST_HEADERS:
        assert answer.headers.get(header), f"{header} is missing: {answer.headers}"


def test_attribution_is_on_the_receipt(server, name):
    answer = server.post(
        "/v1/chat/completions",
        {"model": name, "messages": HELLO, "max_tokens": 2, "user": "u-1", "metadata": {"run": "r-1"}},
        {"x-obol-team": "search", "x-obol-feature": "ranking", "x-request-id": "mine-1"},
    )
    assert answer.status == 200, answer.body
    receipt = server.receipt(answer.headers["x-request-id"])
    assert receipt["tags"]["team"] == "search" and receipt["tags"]["feature"] == "ranking"
    assert receipt["client_request_id"] == "mine-1" or receipt["request_id"] != "mine-1"
    assert receipt["tenant"] == "anonymous"


def test_an_idempotency_key_is_charged_once(server, name):
    body = {"model": name, "messages": HELLO, "max_tokens": 2}
    first = server.post("/v1/chat/completions", body, {"idempotency-key": "once"})
    again = server.post("/v1/chat/completions", body, {"idempotency-key": "once"})
    assert (first.status, again.status) == (200, 409), again.body
    error = again.error()
    assert error["code"] == "idempotency_key_reused"
    assert first.headers["x-request-id"] in error["message"]


def test_an_unknown_receipt_is_not_found(server):
    answer = server.get("/v1/requests/00000000000000000000000000000000")
    assert answer.status == 404 and answer.error()["type"] == "invalid_request_error"


def test_report_and_audit_say_what_the_receipts_say(start, name):
    own = start("--max-model-len", "512")
    receipts = []
    for number in range(5):
        body = own.ok(
            "/v1/completions", {"model": name, "prompt": f"Number {number} is", "max_tokens": 3 + number}
        )
        receipts.append(body["usage"]["obol"])
    total = sum(Decimal(receipt["cost"]["total"]) for receipt in receipts)
    nanos = sum(int(receipt["device_ns"]["total"]) for receipt in receipts)
    for when in ("running", "stopped"):
        own.audit()
        result = harness.run("report", "--json", "--data-dir", str(own.data_dir))
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert sum(row["requests"] for row in report["rows"]) == len(receipts)
        assert sum(Decimal(row["usage_cost"]) for row in report["rows"]) == total, when
        assert sum(Decimal(row["gpu_seconds"]) for row in report["rows"]) * 10**9 == nanos, when
        for balance in report["balances"]:
            parts = sum(Decimal(balance[part]) for part in ("usage", "house", "open"))
            assert Decimal(balance["bill"]) == parts, when
        if when == "running":
            assert own.stop() == 0, own.log()


def test_metrics_print_the_books(start, name):
    own = start("--max-model-len", "512")
    receipts = [
        own.ok("/v1/completions", {"model": name, "prompt": "A", "max_tokens": 5})["usage"]["obol"]
        for _ in range(3)
    ]
    metrics = own.wait_idle()
    seconds = sum(Decimal(receipt["gpu_seconds"]) for receipt in receipts)
    assert metrics.total("obol_gpu_seconds_total") == pytest.approx(float(seconds), rel=1e-9)
    cost = sum(Decimal(receipt["cost"]["total"]) for receipt in receipts)
    assert metrics.total("obol_cost_total") == pytest.approx(float(cost), rel=1e-9)
    assert metrics.total("obol_ledger_conservation_error_ns") == 0
    assert metrics.total("vllm:generation_tokens_total") == 15
    assert metrics.total("vllm:prompt_tokens_total") == sum(r["tokens"]["prompt"] for r in receipts)
    assert metrics.total("vllm:request_success_total") == 3
