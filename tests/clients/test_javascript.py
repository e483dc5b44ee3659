"""The real `openai` package for JavaScript against the server: js/openai.js asks, here is what must come back."""

import json
import os
import subprocess
from pathlib import Path

import harness
import pytest

SCRIPT = Path(__file__).parent / "js" / "openai.js"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def ask(server: harness.Server, case: str, key: str = "any"):
    """What the script's case prints. It is read from stdin, so that packages are looked for where they were installed."""
    packages = harness.required("OBOL_TEST_JS")
    environment = harness.clean_environment() | {"OBOL_URL": server.url, "OBOL_KEY": key}
    result = subprocess.run(
        [harness.required("OBOL_TEST_NODE"), "--input-type=module", "-", case],
        cwd=packages,
        stdin=SCRIPT.open("rb"),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def cost_of(usage: dict) -> dict:
    """The receipt in an answer."""
    assert usage["cost"] == pytest.approx(float(usage["obol"]["cost"]["total"])) and usage["cost"] > 0
    return usage["obol"]


def is_weather(arguments: str) -> bool:
    read = json.loads(arguments)
    return set(read) == {"city", "unit"} and read["unit"] in ("celsius", "fahrenheit")


def test_models_are_listed(server, name):
    assert name in ask(server, "models")


def test_a_chat_and_its_cost(server, client, name):
    found = ask(server, "chat")
    same = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=24)
    message = found["answer"]["choices"][0]["message"]
    assert message["content"] == same.choices[0].message.content != ""
    receipt = cost_of(found["answer"]["usage"])
    assert receipt == server.receipt(found["request_id"])
    assert found["cost"] == receipt["cost"]["total"]


def test_streams_give_the_same_text_and_their_cost(server):
    text = ask(server, "chat")["answer"]["choices"][0]["message"]["content"]
    found = ask(server, "stream")
    assert found["text"] == found["helper"] == text and found["deltas"] > 3
    receipt = cost_of(found["usage"])
    assert receipt == server.receipt(receipt["request_id"])


def test_completions(server):
    found = ask(server, "completion")
    assert found["answer"]["choices"][0]["text"] == found["streamed"] != ""
    cost_of(found["answer"]["usage"])


def test_a_named_tool_is_called_and_streamed(server):
    found = ask(server, "tools")
    choice = found["answer"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call], [streamed] = choice["message"]["tool_calls"], found["streamed"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and is_weather(call["function"]["arguments"])
    assert streamed["function"] == call["function"] and streamed["id"]
    cost_of(found["answer"]["usage"])


def test_the_tool_runner_calls_and_tells(server):
    found = ask(server, "runner")
    [read] = found["called"]
    assert is_weather(json.dumps(read))
    assert found["gave"]["role"] == "tool" and found["gave"]["content"] == "18 degrees"
    cost_of(found["said"]["usage"])


def test_zod_schemas_are_kept_to(server):
    found = ask(server, "structured")
    for person in (found["parsed"], found["streamed"]):
        assert set(person) == {"name", "age", "mood"} and person["mood"] in ("good", "bad")
        assert 0 <= person["age"] <= 120 and len(person["name"]) <= 20
    assert found["parsed"] == found["streamed"]


def test_embeddings(server):
    found = ask(server, "embeddings")
    assert found["own"] == found["floats"] and len(found["own"]) == 2
    assert cost_of(found["usage"])["cost"]["total"] == found["cost"]


def test_responses(server):
    text = ask(server, "chat")["answer"]["choices"][0]["message"]["content"]
    found = ask(server, "responses")
    assert found["text"] == found["helper"] == text
    events = found["events"]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == text
    assert events[0]["type"] == "response.created"
    for response in (found["first"], events[-1]["response"], found["second"]):
        receipt = cost_of(response["usage"])
        assert receipt == server.receipt(receipt["request_id"])
    assert found["second"]["usage"]["input_tokens"] > found["first"]["usage"]["total_tokens"]


def test_a_batch_of_a_file(server):
    text = ask(server, "chat")["answer"]["choices"][0]["message"]["content"]
    found = ask(server, "batch")
    assert found["batch"]["status"] == "completed" and found["deleted"] is True
    counts = found["batch"]["request_counts"]
    assert (counts["total"], counts["completed"], counts["failed"]) == (2, 1, 1)
    [output], [error] = found["outputs"], found["errors"]
    assert (output["custom_id"], error["custom_id"]) == ("line-0", "line-1")
    answer = output["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == text
    receipt = cost_of(answer["usage"])
    assert receipt == server.receipt(receipt["request_id"])


def test_an_aborted_stream_leaves_one_settled_receipt(server):
    found = ask(server, "abort")
    assert found["seen"] >= 4
    server.wait_idle()
    receipt = server.receipt(found["request_id"])
    assert receipt["status"] == "cancelled" and 0 < receipt["tokens"]["completion"] < 1500
    server.audit()


def test_errors_are_the_packages_own(server):
    found = ask(server, "errors")
    assert found["bad"] == {"name": "BadRequestError", "status": 400, "code": found["bad"]["code"], "param": "temperature"}
    assert found["missing"]["name"] == "NotFoundError" and found["missing"]["code"] == "model_not_found"
