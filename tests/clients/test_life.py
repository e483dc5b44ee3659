"""Crowds, hang-ups, kill -9, SIGTERM: whatever happens to clients or server, the books add up."""

import http.client
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import harness
import openai
import pytest

CHAT = "/v1/chat/completions"
KILL_ROUNDS = int(os.environ.get("OBOL_KILL_ROUNDS", "3"))


def messages(number: int) -> list[dict]:
    return [{"role": "user", "content": f"Tell me story number {number} about the sea."}]


def test_a_full_queue_is_a_rate_limit_error(start):
    own = start("--max-sequences", "1", "--queue-depth", "1", "--max-model-len", "1024")
    client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="any", max_retries=0, timeout=300)
    refused, served = [], []

    def ask(number: int) -> None:
        try:
            client.chat.completions.create(
                model="default", messages=messages(number), max_tokens=harness.long(200), extra_body={"ignore_eos": True}
            )
            served.append(number)
        except openai.RateLimitError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert served and refused
    for error in refused:
        assert error.code == "queue_full" and error.type == "rate_limit_error"
        assert int(error.response.headers["retry-after"]) >= 1
    metrics = own.wait_idle()
    assert metrics.total("vllm:request_success_total") == len(served), "a refused request costs nothing"
    own.audit()


def test_64_streams_of_which_20_hang_up(start):
    own = start("--queue-depth", "128", "--max-model-len", "1024")
    leavers = set(random.Random(5).sample(range(64), 20))

    def ask(number: int) -> str:
        leaves = number in leavers
        body = {"model": "default", "messages": messages(number), "max_tokens": harness.long(400) if leaves else harness.long(24)}
        stream = own.stream(CHAT, {**body, "ignore_eos": True})
        last = None
        for seen, event in enumerate(stream.events()):
            assert "error" not in event, event
            last = event
            if leaves and seen == 3 + number % 7:
                break
        if not leaves:
            assert stream.done, "a stream ends with [DONE]"
            assert last["usage"]["completion_tokens"] == harness.long(24)
        stream.close()
        return stream.headers["x-request-id"]

    with ThreadPoolExecutor(64) as pool:
        ids = list(pool.map(ask, range(64)))
    metrics = own.wait_idle()
    assert len(set(ids)) == 64
    assert metrics.total("vllm:request_success_total") == 64
    for number, request_id in enumerate(ids):
        receipt = own.receipt(request_id)
        assert receipt["status"] == ("cancelled" if number in leavers else "length"), receipt
        assert receipt["tokens"]["completion"] < 400
    own.audit()
    assert own.metrics().total("obol_ledger_conservation_error_ns") == 0
    assert own.stop() == 0
    own.audit()


def load_until_dead(server: harness.Server, acknowledged: dict[str, str], started: threading.Event) -> None:
    """Asks and asks; notes each cost that reached the client before the server died."""

    def note(receipt: dict) -> None:
        acknowledged[receipt["request_id"]] = receipt["cost"]["total"]
        started.set()

    number = 0
    while True:
        number += 1
        body = {"model": "default", "messages": messages(number), "max_tokens": 1 + number % 12}
        try:
            if number % 2:
                note(server.post(CHAT, body).json()["usage"]["obol"])
                continue
            stream = server.stream(CHAT, body)
            for event in stream.events():
                if event.get("usage"):
                    note(event["usage"]["obol"])
            stream.close()
        except (OSError, ValueError, http.client.HTTPException):
            # The connection broke, or the body did before its end: nothing was acknowledged.
            return


def test_kill_9_loses_no_acknowledged_receipt(tmp_path, say):
    own = harness.Server(tmp_path / "data", "--max-model-len", "512")
    acknowledged: dict[str, str] = {}
    draw = random.Random(17)
    for round_number in range(KILL_ROUNDS):
        own.start()
        if round_number > 0:
            own.audit()
        started = threading.Event()
        clients = [
            threading.Thread(target=load_until_dead, args=(own, acknowledged, started)) for _ in range(6)
        ]
        for client in clients:
            client.start()
        assert started.wait(120), f"round {round_number}: nothing was served\n{own.log()}"
        time.sleep(draw.uniform(0.0, 1.5))
        own.kill()
        for client in clients:
            client.join(60)
    own.start()
    found = {request_id: own.get(f"/v1/requests/{request_id}") for request_id in acknowledged}
    missing = [request_id for request_id, answer in found.items() if answer.status != 200]
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged receipts are gone: {missing[:5]}"
    for request_id, cost in acknowledged.items():
        assert found[request_id].json()["cost"]["total"] == cost, request_id
    own.audit()
    assert own.stop() == 0
    own.audit()
    say(f"kill -9: {KILL_ROUNDS} rounds, {len(acknowledged)} acknowledged receipts, none missing")


def test_sigterm_drains(start):
    own = start("--max-model-len", "1024")
    request = {"model": "default", "max_tokens": harness.long(150), "ignore_eos": True}
    streams = [own.stream(CHAT, {**request, "messages": messages(number)}) for number in range(4)]
    events = [stream.events() for stream in streams]
    for stream in events:
        next(stream)
    own.terminate()
    deadline = time.monotonic() + 30
    while own.get("/ready").status != 503:
        assert time.monotonic() < deadline, "a draining server is not ready"
    refused = own.post(CHAT, {"model": "default", "messages": messages(9), "max_tokens": 1})
    assert refused.status == 503, refused.body
    error = refused.error()
    assert error["type"] == "unavailable_error" and error["code"] == "draining"
    for stream, rest in zip(streams, events, strict=True):
        *_, last = rest
        assert stream.done and last["usage"]["completion_tokens"] == harness.long(150)
    assert own.process.wait(60) == 0, own.log()
    own.audit()


def test_preemption_changes_no_token_and_the_books_add_up(start):
    """Blocks for about two of the eight requests: the rest are preempted and computed again."""
    request = {"model": "default", "temperature": 0, "max_tokens": harness.long(160), "ignore_eos": True}

    def texts(server: harness.Server, at_once: int) -> list[str]:
        def ask(number: int) -> str:
            body = server.ok(CHAT, {**request, "messages": messages(number)})
            return body["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(ask, range(8)))

    roomy = start("--max-model-len", "256")
    alone = texts(roomy, 1)
    answer = roomy.ok(CHAT, {**request, "messages": messages(0)})
    receipt = answer["usage"]["obol"]
    # The last token is never read, so its KV is not kept.
    held = answer["usage"]["total_tokens"] - 1
    blocks = -(-held // 16)
    enough_for_two = max(16, 9 * blocks // 4) * (receipt["kv_peak_bytes"] // blocks)
    roomy.kill()
    tight = start("--max-model-len", "256", "--kv-memory", str(enough_for_two))
    crowded = texts(tight, 8)
    metrics = tight.wait_idle()
    assert metrics.total("vllm:num_preemptions_total") > 0
    tight.audit()
    assert crowded == alone


@pytest.mark.parametrize("n", [1, 3])
def test_a_cancelled_stream_frees_its_blocks(start, n):
    own = start("--max-model-len", "1024")
    stream = own.stream(CHAT, {"model": "default", "messages": messages(1), "max_tokens": harness.long(800), "n": n})
    next(stream.events())
    stream.close()
    own.wait_idle()
    receipt = own.receipt(stream.headers["x-request-id"])
    assert receipt["status"] in ("cancelled", "stop")
    own.audit()
