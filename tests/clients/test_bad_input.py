"""Bad input: each gets the right error object, and the server serves the next request."""

import errno
import json
import socket

import pytest
from conftest import CONTEXT

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields) -> dict:
    return {"model": "default", "messages": HELLO, "max_tokens": 2, **fields}


def text(**fields) -> dict:
    return {"model": "default", "prompt": "hi", "max_tokens": 2, **fields}


@pytest.fixture(autouse=True)
def the_server_lives(server):
    yield
    assert server.alive(), server.log()
    server.ok(TEXT, text())


# (what, path, body, param that the error names; None where no field is to blame)
BODIES = [
    ("broken JSON", CHAT, b'{"model": "default", "messages": [', None),
    ("no body", CHAT, b"", None),
    ("a list", CHAT, b"[]", None),
    ("a number", TEXT, b"1e999", None),
    (
        "invalid UTF-8",
        CHAT,
        b'{"model": "default", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        None,
    ),
    ("deep nesting", CHAT, b"[" * 100_000, None),
    ("messages: string", CHAT, chat(messages="hi"), "messages"),
    ("messages: missing", CHAT, {"model": "default"}, "messages"),
    ("messages: empty", CHAT, chat(messages=[]), "messages"),
    ("messages: number", CHAT, chat(messages=[1]), "messages"),
    ("role: unknown", CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), "messages"),
    ("content: number", CHAT, chat(messages=[{"role": "user", "content": 3}]), "messages"),
    (
        "content: image",
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages",
    ),
    ("model: number", CHAT, chat(model=3), "model"),
    ("max_tokens: string", CHAT, chat(max_tokens="many"), "max_tokens"),
    ("max_tokens: zero", CHAT, chat(max_tokens=0), "max_tokens"),
    ("max_tokens: negative", CHAT, chat(max_tokens=-1), "max_tokens"),
    ("max_tokens: fraction", CHAT, chat(max_tokens=1.5), "max_tokens"),
    ("max_tokens: huge", CHAT, chat(max_tokens=10**9), "max_tokens"),
    ("max_tokens: past u64", CHAT, chat(max_tokens=10**30), "max_tokens"),
    ("both limits", CHAT, chat(max_completion_tokens=3), "max_completion_tokens"),
    ("temperature: string", CHAT, chat(temperature="hot"), "temperature"),
    ("temperature: 3", CHAT, chat(temperature=3), "temperature"),
    ("top_p: 2", CHAT, chat(top_p=2), "top_p"),
    ("n: zero", CHAT, chat(n=0), "n"),
    ("n: huge", CHAT, chat(n=100_000), "n"),
    ("stop: number", CHAT, chat(stop=3), "stop"),
    ("stop: too many", CHAT, chat(stop=[str(i) for i in range(1000)]), "stop"),
    ("stream: string", CHAT, chat(stream="yes"), "stream"),
    ("top_logprobs: 1000", CHAT, chat(logprobs=True, top_logprobs=1000), "top_logprobs"),
    ("top_logprobs alone", CHAT, chat(top_logprobs=2), "top_logprobs"),
    ("logit_bias: list", CHAT, chat(logit_bias=[1]), "logit_bias"),
    ("logit_bias: no token", CHAT, chat(logit_bias={"99999999": 1}), "logit_bias"),
    ("response_format: xml", CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
    ("tools", CHAT, chat(tools=[{"type": "function"}]), "tools[0].function"),
    ("unknown field", CHAT, chat(temprature=1), "temprature"),
    ("prompt: missing", TEXT, {"model": "default"}, "prompt"),
    ("prompt: empty list", TEXT, text(prompt=[]), "prompt"),
    ("prompt: token out of range", TEXT, text(prompt=[1, 10**8]), "prompt"),
    ("prompt: negative token", TEXT, text(prompt=[-1]), "prompt"),
    ("prompt: object", TEXT, text(prompt={"a": 1}), "prompt"),
    ("logprobs: 1000", TEXT, text(logprobs=1000), "logprobs"),
    ("suffix", TEXT, text(suffix="end"), "suffix"),
    ("tokenize: nothing", "/tokenize", {"model": "default"}, None),
    ("detokenize: out of range", "/detokenize", {"model": "default", "tokens": [10**8]}, "tokens"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES]
)
def test_a_bad_body_is_a_400(server, path, body, param):
    answer = server.post(path, body)
    assert answer.status == 400, (answer.status, answer.body[:500])
    error = answer.error()
    assert error["type"] == "invalid_request_error"
    if param is not None:
        # A field inside is named by its path: messages[0].role.
        assert error["param"] is not None and error["param"].startswith(param), error


def test_an_unknown_model_is_a_404(server):
    answer = server.post(CHAT, chat(model="gpt-4"))
    assert answer.status == 404
    assert answer.error()["code"] == "model_not_found" and "gpt-4" in answer.error()["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_prompt_over_the_context_names_both_lengths(server, path):
    words = "word " * (2 * CONTEXT)
    body = chat(messages=[{"role": "user", "content": words}]) if path == CHAT else text(prompt=words)
    answer = server.post(path, body)
    error = answer.error()
    assert answer.status == 400 and error["code"] == "context_length_exceeded", error
    numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in error["message"]).split()]
    assert CONTEXT in numbers and any(number > CONTEXT for number in numbers), error


def test_an_answer_over_the_context_is_a_400(server):
    error = server.post(CHAT, chat(max_tokens=CONTEXT)).error()
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens", error


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_20_megabytes_is_refused(server, announced):
    """The server may answer before it has read it all, and close: what it said has to arrive."""
    body = json.dumps(chat(messages=[{"role": "user", "content": "x" * 20_000_000}])).encode()
    framing = f"content-length: {len(body)}" if announced else "transfer-encoding: chunked"
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode()
    payload = body if announced else b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head)
        try:
            connection.sendall(payload)
        except OSError:
            pass  # refused in the middle
        status = connection.makefile("rb").readline()
    assert b" 413 " in status, status


def test_the_error_of_a_large_body(server):
    connection = server.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("content-length", "20000000")
    connection.putheader("content-type", "application/json")
    connection.endheaders()
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert response.status == 413 and error["code"] == "request_too_large", error
    connection.close()


def test_a_body_sent_by_half(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n"
        connection.sendall(head.encode() + b'{"model": "def')
    server.wait_idle()


def test_what_is_not_http(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200))
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            assert error.errno == errno.ENOTCONN, "the server has hung up already"
        connection.makefile("rb").read()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods(server, method, path, status):
    answer = server.request(method, path)
    assert answer.status == status
    assert answer.error()["type"] == "invalid_request_error"
