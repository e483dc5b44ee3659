"""The real `openai` package against `/v1/embeddings`, and rerank and score beside it: vectors, and what they cost."""

import base64
import json
import math
import struct
import threading
import time
from pathlib import Path

import harness
import httpx
import openai
import pytest

CATS = "The cat sits on the mat."
KITTEN = "A kitten rests on a rug."
BUDGET = "The quarterly budget was approved by the board."
TEXTS = [CATS, KITTEN, BUDGET, "x"]
CONTEXT = 256


@pytest.fixture(scope="module", params=["last", "mean"])
def pooled(request, tmp_path_factory):
    """A server with each pooling of its own generation model."""
    own = harness.Server(
        tmp_path_factory.mktemp(f"pool-{request.param}") / "data",
        *("--pooling", request.param, "--max-model-len", str(CONTEXT), "--kv-memory", "64MiB"),
    ).start()
    yield own
    assert own.alive(), own.log()
    own.wait_idle()
    assert own.stop() == 0, own.log()
    own.audit()


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=300)


def vectors_of(server, texts, model="default", **more) -> list[list[float]]:
    answer = client_of(server).embeddings.create(model=model, input=texts, **more)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


def cosine(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def post(server, path, **body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "default"} | body, timeout=300)


def check_cost(server, response: httpx.Response, tokens: int | None = None) -> dict:
    """Header, body and receipt say the same; the receipt."""
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    receipt = usage["obol"]
    assert response.headers["x-obol-cost"] == receipt["cost"]["total"]
    assert usage["cost"] == pytest.approx(float(receipt["cost"]["total"])) and usage["cost"] > 0
    assert receipt == server.receipt(response.headers["x-request-id"])
    assert receipt["status"] == "stop" and receipt["tokens"]["completion"] == 0
    assert usage["prompt_tokens"] == usage["total_tokens"] == receipt["tokens"]["prompt"]
    assert tokens is None or usage["total_tokens"] == tokens
    return receipt


def test_vectors_are_the_same_as_numbers_in_base64_alone_and_together(pooled):
    together = vectors_of(pooled, TEXTS, encoding_format="float")
    # The package asks for base64 by itself.
    assert vectors_of(pooled, TEXTS) == together
    raw = post(pooled, "/v1/embeddings", input=CATS, encoding_format="base64").json()["data"][0]["embedding"]
    data = base64.b64decode(raw, validate=True)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == together[0]
    for text, vector in zip(TEXTS, together, strict=True):
        assert vectors_of(pooled, text) == [vector], "a batch gives what each gives alone"
        assert cosine(vector, vector) == pytest.approx(1, abs=1e-5)
    tokens = pooled.ok("/tokenize", {"prompt": CATS})["tokens"]
    assert vectors_of(pooled, tokens) == vectors_of(pooled, [tokens]) == together[:1]
    assert len({tuple(vector) for vector in together}) == len(TEXTS)
    assert cosine(together[0], together[1]) > cosine(together[0], together[3]), "nearer to a text like it"


def test_fewer_dimensions_are_the_first_ones(pooled):
    whole, cut = vectors_of(pooled, CATS)[0], vectors_of(pooled, CATS, dimensions=64)[0]
    length = math.sqrt(math.fsum(x * x for x in whole[:64]))
    assert cut == pytest.approx([x / length for x in whole[:64]], abs=1e-6)
    refused = post(pooled, "/v1/embeddings", input=CATS, dimensions=len(whole) + 1)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"
    assert str(len(whole)) in refused.json()["error"]["message"]


def test_documents_are_ranked_and_pairs_scored(pooled):
    query, a, b = vectors_of(pooled, [CATS, KITTEN, BUDGET])
    ranked = post(pooled, "/v1/rerank", query=CATS, documents=[BUDGET, {"text": KITTEN}, CATS])
    check_cost(pooled, ranked)
    results = ranked.json()["results"]
    assert results[0]["index"] == 2 and results[0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert {result["index"] for result in results} == {0, 1, 2}
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    by_index = {result["index"]: result for result in results}
    assert by_index[1]["relevance_score"] == pytest.approx(cosine(query, a), abs=1e-6)
    assert by_index[1]["document"] == {"text": KITTEN}
    scored = post(pooled, "/v1/score", text_1=CATS, text_2=[KITTEN, BUDGET])
    check_cost(pooled, scored)
    values = [item["score"] for item in scored.json()["data"]]
    assert values == pytest.approx([cosine(query, a), cosine(query, b)], abs=1e-6)


def test_what_cannot_be_computed_is_refused_by_name(pooled):
    long = "word " * (CONTEXT + 40)
    cases = [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "number 1"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [10**6]}, "input[0]", "token id"),
        ({"input": long}, "input", f"at most {CONTEXT} tokens"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "stream": True}, "stream", "unknown"),
    ]
    for body, param, word in cases:
        response = post(pooled, "/v1/embeddings", **body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == param, error
        assert word in error["message"], error
    with pytest.raises(openai.NotFoundError):
        vectors_of(pooled, "a", model="nobody")


def test_the_cost_is_the_same_in_header_body_and_receipt(pooled):
    headers = {"x-obol-team": "search"}
    with client_of(pooled).embeddings.with_streaming_response.create(
        model="default", input=TEXTS, user="ada", extra_headers=headers
    ) as raw:
        answer = raw.parse()
        cost = raw.headers["x-obol-cost"]
        receipt = pooled.receipt(raw.headers["x-request-id"])
    assert answer.usage.model_extra["obol"] == receipt and receipt["cost"]["total"] == cost
    assert (receipt["user"], receipt["tags"]["team"]) == ("ada", "search")
    assert int(receipt["device_ns"]["prefill"]) > 0 == int(receipt["device_ns"]["decode"])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == receipt["tokens"]["prompt"]
    tokens = sum(pooled.ok("/tokenize", {"prompt": text})["count"] for text in TEXTS)
    response = post(pooled, "/v1/embeddings", input=TEXTS)
    check_cost(pooled, response, tokens)


def test_who_hangs_up_leaves_one_settled_receipt(pooled):
    inputs = [f"{at} " + "word " * (CONTEXT // 2) for at in range(200)]
    connection = pooled.connect()
    body = json.dumps({"model": "default", "input": inputs})
    once = {"idempotency-key": "only once"}
    connection.request("POST", "/v1/embeddings", body, once)
    deadline = time.monotonic() + 60
    while pooled.metrics().total("vllm:num_requests_running") == 0:
        assert time.monotonic() < deadline, "it never ran"
    connection.close()
    pooled.wait_idle()
    newest = pooled.get("/v1/requests?limit=1").json()["data"][0]
    assert newest["status"] == "cancelled" and newest["tokens"]["completion"] == 0
    assert int(newest["device_ns"]["total"]) > 0
    again = pooled.post("/v1/embeddings", {"model": "default", "input": "a"}, once)
    assert again.status == 409 and newest["request_id"] in again.json()["error"]["message"]
    pooled.audit()


# ---- an encoder beside the model

MINILM = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    """A server with an encoder beside its model."""
    flags = ("--embedding-model", harness.embedding_model(), "--kv-memory", "64MiB")
    own = harness.Server(tmp_path_factory.mktemp("encoder") / "data", *flags).start()
    yield own
    assert own.alive(), own.log()
    own.wait_idle()
    assert own.stop() == 0, own.log()
    own.audit()


def test_the_encoder_gives_the_vectors_of_another_implementation(encoding):
    """tests/golden/minilm.json is numpy's; see models/tests/make_encoder.py."""
    path = Path(__file__).parents[1] / "golden" / "minilm.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for case in cases:
        tokens = encoding.ok("/tokenize", {"model": MINILM, "prompt": case["text"]})["tokens"]
        assert tokens == case["ids"], case["text"]
    cases = [case for case in cases if "vector" in case]
    assert len(cases) > 8
    vectors = vectors_of(encoding, [case["text"] for case in cases], MINILM)
    for case, vector in zip(cases, vectors, strict=True):
        assert cosine(vector, case["vector"]) > 0.99999, case["text"]
        assert vector == pytest.approx(case["vector"], abs=1e-4)
        assert vectors_of(encoding, case["ids"], MINILM) == [vector], "alone and as tokens it has the same bits"
    assert vectors_of(encoding, [case["text"] for case in cases], MINILM, encoding_format="float") == vectors


def test_what_means_the_same_is_nearer(encoding):
    cats, kitten, budget = vectors_of(encoding, [CATS, KITTEN, BUDGET], MINILM)
    assert cosine(cats, kitten) > 0.4 > 0.2 > cosine(cats, budget)
    documents = [BUDGET, KITTEN, "Interest rates were raised by the bank.", "A dog sleeps on the carpet."]
    ranked = post(encoding, "/v1/rerank", model=MINILM, query=CATS, documents=documents, top_n=2)
    check_cost(encoding, ranked)
    assert [result["index"] for result in ranked.json()["results"]] == [1, 3]
    scored = post(encoding, "/v1/score", model=MINILM, text_1=CATS, text_2=[KITTEN, BUDGET])
    values = [item["score"] for item in scored.json()["data"]]
    assert values == pytest.approx([cosine(cats, kitten), cosine(cats, budget)], abs=1e-6)


def test_the_encoder_is_a_model_of_its_own(encoding):
    models = {model.id: model.model_extra for model in client_of(encoding).models.list().data}
    assert len(models) == 2 and models[MINILM]["max_model_len"] == 256
    own = post(encoding, "/v1/embeddings", input=CATS)
    encoded = post(encoding, "/v1/embeddings", input=CATS, model=MINILM)
    assert len(own.json()["data"][0]["embedding"]) == 576
    assert len(encoded.json()["data"][0]["embedding"]) == 384
    receipt = check_cost(encoding, encoded, 9)
    assert (receipt["model"], receipt["precision"], receipt["kv_byte_seconds"]) == (MINILM, "F32", "0.000000000")
    assert int(receipt["device_ns"]["prefill"]) > 0 and receipt["steps"] == 1
    assert check_cost(encoding, own)["model"] != MINILM
    chat = {"model": MINILM, "messages": [{"role": "user", "content": "hi"}]}
    refused = encoding.post("/v1/chat/completions", chat)
    assert refused.status == 400 and "embeddings only" in refused.error()["message"]
    too_long = post(encoding, "/v1/embeddings", input=["a", "word " * 300], model=MINILM)
    message = too_long.json()["error"]["message"]
    assert too_long.status_code == 400 and "at most 256 tokens" in message and "has 302" in message
    bad = post(encoding, "/v1/embeddings", input=[101, 40000, 102], model=MINILM).json()["error"]
    assert bad["param"] == "input[1]" and "30521" in bad["message"]


def test_both_models_work_at_the_same_time(encoding):
    """Texts and answers share the device; each gets what it gets alone, and the books add up."""
    ask = {"model": "default", "messages": [{"role": "user", "content": CATS}], "temperature": 0, "max_tokens": 24}
    alone = encoding.ok("/v1/chat/completions", ask)["choices"][0]["message"]["content"]
    texts = [f"{at}: {CATS} {BUDGET}" for at in range(60)]
    expected = vectors_of(encoding, texts, MINILM)
    wrong = []

    def chat():
        said = encoding.ok("/v1/chat/completions", ask)["choices"][0]["message"]["content"]
        wrong.extend([said] if said != alone else [])

    def embed():
        wrong.extend(["vectors"] if vectors_of(encoding, texts, MINILM) != expected else [])

    threads = [threading.Thread(target=work) for work in (chat, embed, chat, embed, embed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    encoding.audit()


def test_who_hangs_up_on_the_encoder_leaves_one_settled_receipt(encoding):
    inputs = [f"{at} " + "word " * 200 for at in range(1500)]
    connection = encoding.connect()
    connection.request("POST", "/v1/embeddings", json.dumps({"model": MINILM, "input": inputs}))
    deadline = time.monotonic() + 60
    while encoding.metrics().total("vllm:num_requests_running") == 0:
        assert time.monotonic() < deadline, "it never ran"
    connection.close()
    encoding.wait_idle()
    newest = encoding.get("/v1/requests?limit=1").json()["data"][0]
    assert newest["status"] == "cancelled" and newest["model"] == MINILM
    assert int(newest["device_ns"]["total"]) > 0
    encoding.audit()


def test_a_model_that_only_embeds_does_not_serve_alone(tmp_path):
    places = ("--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    refused = harness.run("serve", "--model", MINILM, *places)
    assert refused.returncode == 2 and "--embedding-model" in refused.stderr
