"""The real `llm` command and its Python API, with the server as an extra OpenAI model of theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import yaml

QUESTION = "What is the capital of France?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def home(server, tmp_path_factory) -> Path:
    """The command's folder, with the server in it as a chat and as a completion model."""
    folder = tmp_path_factory.mktemp("llm")
    both = {"model_name": "default", "api_base": f"{server.url}/v1"}
    chat = {"model_id": "obol", **both, "supports_schema": True, "supports_tools": True}
    completion = {"model_id": "obol-text", **both, "completion": True}
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump([chat, completion]))
    return folder


def llm(home: Path, *arguments: str, **environment: str) -> str:
    """What the command prints."""
    command = Path(sys.executable).with_name("llm")
    environment = harness.clean_environment() | {"LLM_USER_PATH": str(home), "HOME": str(home)} | environment
    result = subprocess.run(
        [command, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=home,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


OPTIONS = ("-o", "temperature", "0", "-o", "max_tokens", "24")


def logged(home: Path, answers: int) -> list[dict]:
    """What the command logged of its last answers, the oldest first."""
    return json.loads(llm(home, "logs", "--json", "-n", str(answers)))


def cost_of(usage: dict) -> dict:
    """The receipt in an answer's usage."""
    assert usage["cost"] == pytest.approx(float(usage["obol"]["cost"]["total"])) and usage["cost"] > 0
    return usage["obol"]


def test_the_command_chats_streams_goes_on_and_logs_the_cost(home, server, client, name):
    whole = llm(home, "-m", "obol", "--no-stream", *OPTIONS, QUESTION)
    messages = [{"role": "user", "content": QUESTION}]
    same = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=24)
    assert whole.removesuffix("\n") == same.choices[0].message.content
    assert llm(home, "-m", "obol", *OPTIONS, QUESTION) == whole
    llm(home, "-c", *OPTIONS, "And of Italy?")
    answers = logged(home, 3)
    for answer in answers:
        # From what it keeps of the usage it leaves out zeros.
        receipt = cost_of(json.loads(answer["token_details"]))
        kept = server.receipt(receipt["request_id"])
        assert receipt["cost"]["total"] == kept["cost"]["total"]
        assert answer["input_tokens"] == kept["tokens"]["prompt"]
        assert answer["output_tokens"] == kept["tokens"]["completion"]
    _, streamed, second = answers
    assert second["conversation_id"] == streamed["conversation_id"]
    assert second["input_tokens"] > streamed["input_tokens"] + streamed["output_tokens"]


def test_the_command_completes(home):
    assert llm(home, "-m", "obol-text", "--no-stream", *OPTIONS, "Once upon a time").strip()
    [answer] = logged(home, 1)
    cost_of(answer["response_json"]["usage"])


def test_the_command_keeps_to_a_schema(home):
    said = llm(home, "-m", "obol", "-o", "temperature", "0", "--schema", json.dumps(PERSON), "Describe a person.")
    person = json.loads(said)
    assert set(person) == {"name", "age", "mood"} and person["mood"] in ("good", "bad")


def test_the_command_embeds(start, home):
    # It takes other models of vectors from plugins only, but any address.
    own = start("--served-model-name", "text-embedding-3-small", "--max-model-len", "256", "--kv-memory", "64MiB")
    address = {"OPENAI_BASE_URL": f"{own.url}/v1", "OPENAI_API_KEY": "any"}
    vector = json.loads(llm(home, "embed", "-m", "3-small", "-c", "The cat sits on the mat.", **address))
    same = own.ok("/v1/embeddings", {"model": "default", "input": "The cat sits on the mat."})
    assert vector == pytest.approx(same["data"][0]["embedding"], abs=1e-6)
    own.wait_idle()
    assert own.stop() == 0
    own.audit()


@pytest.fixture
def model(home, monkeypatch):
    """The same model through Python."""
    import llm

    monkeypatch.setenv("LLM_USER_PATH", str(home))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return llm.get_model("obol")


def test_python_chats_and_streams(model, server):
    whole = model.prompt(QUESTION, stream=False, temperature=0, max_tokens=24)
    streamed = model.prompt(QUESTION, temperature=0, max_tokens=24)
    pieces = list(streamed)
    assert "".join(pieces) == whole.text() != "" and len(pieces) > 3
    assert streamed.usage().output == whole.usage().output > 0
    receipts = [cost_of(answer.usage().details) for answer in (whole, streamed)]
    assert len({receipt["request_id"] for receipt in receipts}) == 2


def test_python_offers_tools_and_tells_their_results(model):
    def get_time() -> str:
        """The time of day."""
        return "noon"

    answer = model.prompt("What time is it?", tools=[get_time], temperature=0, max_tokens=60, stream=False)
    without = model.prompt("What time is it?", temperature=0, max_tokens=1, stream=False)
    answer.text()
    without.text()
    assert answer.usage().input > without.usage().input, "the model is told of the tool"
    for call in answer.tool_calls():
        assert call.name == "get_time"


def test_python_keeps_to_a_schema(model):
    answer = model.prompt("Describe a person.", schema=PERSON, temperature=0)
    person = json.loads(answer.text())
    assert set(person) == {"name", "age", "mood"} and 0 <= person["age"] <= 120
    cost_of(answer.usage().details)
