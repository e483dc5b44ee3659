"""However a request of any endpoint ends, it leaves one settled receipt, or none where it never ran, and clean books."""

import json
import time

import harness
import pytest
from test_budgets import receipts_of
from test_keys import ADMIN, SMALL, admin, order

CHAT = [{"role": "user", "content": "Count as far as you can."}]
MODEL = {"model": "default"}
LONG = harness.long(2000)
# By path: a body that takes long, what is wrong with another, and whether it can be streamed.
WORDS = [f"{at} " + "word " * 100 for at in range(200)]
ENDPOINTS = {
    "/v1/chat/completions": ({**MODEL, "messages": CHAT, "max_tokens": LONG, "ignore_eos": True}, {"n": 0}, True),
    "/v1/completions": ({**MODEL, "prompt": "One, two", "max_tokens": LONG, "ignore_eos": True}, {"n": 0}, True),
    "/v1/responses": (
        {**MODEL, "input": "Count.", "max_output_tokens": LONG, "ignore_eos": True},
        {"input": []},
        True,
    ),
    "/v1/messages": ({**MODEL, "messages": CHAT, "max_tokens": LONG, "ignore_eos": True}, {"messages": []}, True),
    "/v1/embeddings": ({**MODEL, "input": WORDS}, {"input": ""}, False),
    "/v1/rerank": ({**MODEL, "query": "money", "documents": WORDS}, {"documents": []}, False),
    "/v1/score": ({**MODEL, "text_1": "money", "text_2": WORDS}, {"text_2": []}, False),
}
LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    flags = ("--max-model-len", "2304", "--max-sequences", "4", "--kv-memory", "256MiB")
    server = harness.Server(tmp_path_factory.mktemp("endings") / "data", *flags, OBOL_ADMIN_KEY=ADMIN).start()
    yield server
    if server.alive():
        assert server.stop() == 0


def key(own: harness.Server, **settings) -> tuple[dict, dict]:
    with admin(own) as http:
        made = order(http, "/key/generate", **settings)
    return made, {"authorization": f"Bearer {made['key']}", "content-type": "application/json"}


def only_receipt(own: harness.Server, made: dict) -> dict:
    own.wait_idle()
    receipts = receipts_of(own, made["key_id"])
    assert len(receipts) == 1, receipts
    return receipts[0]


def until_it_runs(own: harness.Server) -> None:
    deadline = time.monotonic() + 60
    while own.metrics().total("vllm:num_requests_running") == 0:
        assert time.monotonic() < deadline, "it never ran"


@pytest.mark.parametrize("path", LENGTHS)
@pytest.mark.parametrize("streamed", [False, True])
def test_done(own, path, streamed):
    made, headers = key(own)
    body = {**ENDPOINTS[path][0], LENGTHS[path]: 16, "stream": streamed}
    answer = own.request("POST", path, json.dumps(body), headers)
    assert answer.status == 200, answer.body
    receipt = only_receipt(own, made)
    assert (receipt["status"], receipt["tokens"]["completion"]) == ("length", 16)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_gone_before_the_answer(own, path):
    made, headers = key(own)
    connection = own.connect()
    connection.request("POST", path, json.dumps(ENDPOINTS[path][0]), headers)
    until_it_runs(own)
    connection.close()
    receipt = only_receipt(own, made)
    assert receipt["status"] == "cancelled" and int(receipt["device_ns"]["total"]) > 0


@pytest.mark.parametrize("path", [path for path, (_, _, streams) in ENDPOINTS.items() if streams])
def test_gone_in_the_middle_of_a_stream(own, path):
    made, headers = key(own)
    stream = own.stream(path, ENDPOINTS[path][0], headers)
    told = 0
    while told < 9:
        line = stream.response.readline()
        assert line, "it ended by itself"
        told += line.startswith(b"data:")
    stream.close()
    receipt = only_receipt(own, made)
    assert receipt["status"] == "cancelled" and 0 < receipt["tokens"]["completion"] < LONG


@pytest.mark.parametrize("path", ENDPOINTS)
def test_refused(own, path):
    made, headers = key(own)
    body, wrong, _ = ENDPOINTS[path]
    answer = own.request("POST", path, json.dumps({**body, **wrong}), headers)
    assert answer.status == 400, answer.body
    own.wait_idle()
    assert receipts_of(own, made["key_id"]) == []


@pytest.mark.parametrize("path", ENDPOINTS)
def test_cut_by_a_budget(own, path):
    cap = "0.0000015"
    made, headers = key(own, max_budget=cap)
    answer = own.request("POST", path, json.dumps(ENDPOINTS[path][0]), headers)
    assert answer.status in (200, 429), answer.body
    receipt = only_receipt(own, made)
    assert receipt["status"] == "budget" and float(receipt["cost"]["total"]) <= float(cap)


def test_killed(own):
    """The last one: all endpoints at once, when the power goes."""
    made, connections = {}, []
    for path, (body, _, _) in ENDPOINTS.items():
        made[path], headers = key(own)
        connections.append(own.connect())
        connections[-1].request("POST", path, json.dumps(body), headers)
    deadline = time.monotonic() + 60
    # Whoever is not running yet waits; both are open when the books were last written.
    while own.metrics().total("vllm:num_requests_running") + own.metrics().total("vllm:num_requests_waiting") < 7:
        assert time.monotonic() < deadline, "they never came"
    time.sleep(1.5)
    own.kill()
    for connection in connections:
        connection.close()
    own.start()
    for path, one in made.items():
        receipts = receipts_of(own, one["key_id"])
        assert len(receipts) <= 1, (path, receipts)
        assert all(receipt["status"] == "error" for receipt in receipts), (path, receipts)
    assert any(receipts_of(own, one["key_id"]) for one in made.values())
    own.audit()
    assert own.stop() == 0
    own.audit()
