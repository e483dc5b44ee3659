"""The real `litellm` package against the server, as people point it at an OpenAI-compatible address."""

import asyncio
import json
import os
import time
from typing import Literal

# Before litellm is imported: its price list would come over the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import harness
import litellm
import pydantic
import pytest

HELLO = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)
    mood: Literal["good", "bad"]


def asked(server: harness.Server, **more) -> dict:
    provider = {"model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "any", "num_retries": 0}
    return provider | {"messages": HELLO, "temperature": 0, "max_tokens": 24} | more


def cost_of(answer) -> dict:
    """The receipt in an answer."""
    usage = answer.usage.model_dump()
    assert usage["cost"] == pytest.approx(float(usage["obol"]["cost"]["total"])) and usage["cost"] > 0
    return usage["obol"]


def test_a_chat_and_its_cost(server, client, name):
    answer = litellm.completion(**asked(server))
    same = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == same.choices[0].message.content != ""
    receipt = cost_of(answer)
    assert receipt == server.receipt(receipt["request_id"])
    assert answer._hidden_params["response_cost"] == pytest.approx(float(receipt["cost"]["total"]))


def test_streams_give_the_same_text_and_their_cost(server):
    whole = litellm.completion(**asked(server))
    parts = list(litellm.completion(**asked(server, stream=True, stream_options={"include_usage": True})))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content and len(parts) > 3
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    built = litellm.stream_chunk_builder(parts, messages=HELLO)
    assert built.choices[0].message.content == text

    async def later() -> str:
        stream = await litellm.acompletion(**asked(server, stream=True))
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    assert asyncio.run(later()) == text


def test_a_named_tool_is_called_and_its_result_read(server):
    more = {"tools": [WEATHER], "tool_choice": NAMED, "max_tokens": 200}
    answer = litellm.completion(**asked(server, **more))
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city", "unit"}
    parts = list(litellm.completion(**asked(server, **more, stream=True)))
    built = litellm.stream_chunk_builder(parts, messages=HELLO)
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    called = answer.choices[0].message
    gave = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    said = litellm.completion(**asked(server, messages=[*HELLO, called, gave], tools=[WEATHER]))
    assert said.usage.prompt_tokens > answer.usage.prompt_tokens
    cost_of(said)


def test_structured_output(server):
    messages = [{"role": "user", "content": "Describe a person who lives in Paris."}]
    answer = litellm.completion(**asked(server, messages=messages, response_format=Person, max_tokens=200))
    Person.model_validate_json(answer.choices[0].message.content)
    cost_of(answer)


def test_text_completions(server):
    request = asked(server) | {"model": "text-completion-openai/default"}
    del request["messages"]
    answer = litellm.text_completion(**request, prompt="Once upon a time")
    assert answer.choices[0].text and answer.usage.completion_tokens == 24


def test_responses(server):
    request = asked(server, input=HELLO[0]["content"], max_output_tokens=24)
    del request["messages"], request["max_tokens"]
    answer = litellm.responses(**request)
    whole = litellm.completion(**asked(server))
    assert answer.output_text == whole.choices[0].message.content
    receipt = cost_of(answer)
    assert receipt == server.receipt(receipt["request_id"])
    events = list(litellm.responses(**request, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert cost_of(events[-1].response)["tokens"]["completion"] == receipt["tokens"]["completion"]


def test_embeddings(server, client, name):
    request = asked(server, input=["The cat sits on the mat.", "x"])
    for field in ("messages", "temperature", "max_tokens"):
        del request[field]
    answer = litellm.embedding(**request)
    same = client.embeddings.create(model=name, input=request["input"])
    assert [item["embedding"] for item in answer.data] == [item.embedding for item in same.data]
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer._hidden_params["response_cost"] > 0


def test_a_batch_of_a_file(server):
    provider = {"custom_llm_provider": "openai", "api_base": f"{server.url}/v1", "api_key": "any"}
    body = {"model": "default", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = ("lines.jsonl", json.dumps(line).encode())
    file = litellm.create_file(file=lines, purpose="batch", **provider)
    batch = litellm.create_batch(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **provider
    )
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = litellm.retrieve_batch(batch_id=batch.id, **provider)
    assert batch.status == "completed"
    output = json.loads(litellm.file_content(file_id=batch.output_file_id, **provider).content)
    answer = output["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == litellm.completion(**asked(server)).choices[0].message.content
    assert answer["usage"]["cost"] == pytest.approx(float(answer["usage"]["obol"]["cost"]["total"]))


def test_errors_are_the_packages_own(server):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked(server, temperature=-1))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(server) | {"model": "openai/no-such-model"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked(server, messages=[{"role": "user", "content": "word " * 4000}]))
