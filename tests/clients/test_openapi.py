"""`/openapi.json` as programs read it: a good document, and what is really answered is what it says."""

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

SCHEMAS = "#/components/schemas/"
MESSAGES = [{"role": "user", "content": "Say a word."}]
LONELY = {"model": "default", "max_tokens": 4}


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


@pytest.fixture(scope="module")
def document(http) -> dict:
    answer = http.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def schema_of(document: dict, schema: dict) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


def answer_schema(document: dict, method: str, path: str, status: str = "200") -> jsonschema.Draft202012Validator:
    content = document["paths"][path][method]["responses"][status]["content"]
    return schema_of(document, content["application/json"]["schema"])


def test_it_is_a_good_document(document):
    validate(document)
    assert document["openapi"] == "3.1.0" and len(document["paths"]) > 40


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**LONELY, "messages": MESSAGES, "logprobs": True, "n": 2}),
        ("/v1/completions", {**LONELY, "prompt": ["One", "Two"], "logprobs": 1, "echo": True}),
        ("/v1/responses", {"model": "default", "max_output_tokens": 4, "input": "Say a word.", "store": False}),
        ("/v1/responses/input_tokens", {"model": "default", "input": "Say a word."}),
        ("/v1/messages", {**LONELY, "messages": MESSAGES}),
        ("/v1/messages/count_tokens", {"model": "default", "messages": MESSAGES}),
        ("/v1/embeddings", {"model": "default", "input": ["One", "Two"]}),
        ("/v1/rerank", {"model": "default", "query": "money", "documents": ["coin", {"text": "river"}]}),
        ("/v1/score", {"model": "default", "text_1": "money", "text_2": ["coin", "river"]}),
        ("/tokenize", {"prompt": "One"}),
        ("/detokenize", {"tokens": [1, 2]}),
    ],
)
def test_bodies_and_answers_are_as_it_says(document, http, path, body):
    asked = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema_of(document, asked["schema"]).validate(body)
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    answer_schema(document, "post", path).validate(answer.json())
    refused = http.post(path, json={**body, "no_such_field": 1})
    assert refused.status_code == 400, refused.text
    answer_schema(document, "post", path, "default").validate(refused.json())


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/models", ""),
        ("/v1/requests", "?limit=5"),
        ("/v1/organization/costs", "?start_time=1700000000"),
        ("/v1/organization/usage/completions", "?start_time=1700000000"),
        ("/spend/logs", ""),
        ("/global/spend/report", "?group_by=team"),
        ("/tokenizer_info", ""),
        ("/health", ""),
        ("/ready", ""),
        ("/v1/files", ""),
        ("/v1/batches", ""),
    ],
)
def test_what_is_read_is_as_it_says(document, http, path, query):
    answer = http.get(path + query)
    assert answer.status_code == 200, answer.text
    answer_schema(document, "get", path).validate(answer.json())


def test_a_field_out_of_bounds_is_refused_by_the_document_and_by_the_server(document, http):
    good = {**LONELY, "messages": MESSAGES}
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    checked = schema_of(document, body)
    for field, value in [("temperature", 3), ("n", 0), ("top_logprobs", 21), ("stream", "yes"), ("service_tier", "gold")]:
        asked = {**good, field: value}
        assert not checked.is_valid(asked), field
        refused = http.post("/v1/chat/completions", json=asked)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
    assert checked.is_valid(good)


def test_the_page_is_there(http):
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "API reference" in page.text
