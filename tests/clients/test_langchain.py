"""The real `langchain-openai` package against the server: chat, streams, tools, structured output, and their cost."""

from typing import Annotated, Literal

import harness
import langchain_openai
import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool

HELLO = [HumanMessage("What is the capital of France?")]


@tool
def get_weather(city: Annotated[str, pydantic.Field(max_length=20)], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"18 degrees {unit} in {city}"


class Person(pydantic.BaseModel):
    """Someone."""

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)
    mood: Literal["good", "bad"]


def model_of(server: harness.Server, **more) -> langchain_openai.ChatOpenAI:
    more = {"model": "default", "temperature": 0, "max_tokens": 24} | more
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=300, **more
    )


def cost_of(message: AIMessage) -> dict:
    """The receipt in an answer."""
    usage = message.response_metadata["token_usage"]
    assert usage["cost"] == pytest.approx(float(usage["obol"]["cost"]["total"])) and usage["cost"] > 0
    return usage["obol"]


def test_a_chat_and_its_cost(server, client, name):
    answer = model_of(server, include_response_headers=True).invoke(HELLO)
    same = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": HELLO[0].content}],
        temperature=0,
        max_tokens=24,
    )
    assert answer.content == same.choices[0].message.content != ""
    receipt = cost_of(answer)
    assert receipt == server.receipt(receipt["request_id"])
    assert answer.response_metadata["headers"]["x-obol-cost"] == receipt["cost"]["total"]
    assert answer.usage_metadata["input_tokens"] == receipt["tokens"]["prompt"]
    assert answer.usage_metadata["output_tokens"] == receipt["tokens"]["completion"]


def test_a_stream_gives_the_same_text_and_its_usage(server):
    model = model_of(server, stream_usage=True)
    chunks = list(model.stream(HELLO))
    assert len(chunks) > 3
    whole = model.invoke(HELLO)
    assert "".join(chunk.content for chunk in chunks) == whole.content
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [use["output_tokens"] for use in used] == [whole.usage_metadata["output_tokens"]]


def test_several_prompts_at_once(server):
    model = model_of(server, max_tokens=6)
    answers = model.batch([[SystemMessage("Be brief."), HumanMessage(f"{n} + {n} =")] for n in range(4)])
    receipts = [cost_of(answer) for answer in answers]
    assert len({receipt["request_id"] for receipt in receipts}) == 4


def test_a_tool_is_called_and_its_result_read(server):
    model = model_of(server, max_tokens=200)
    forced = model.bind_tools([get_weather], tool_choice="get_weather")
    answer = forced.invoke(HELLO)
    [call] = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["unit"] in ("celsius", "fahrenheit")
    cost_of(answer)
    merged = None
    for chunk in forced.stream(HELLO):
        merged = chunk if merged is None else merged + chunk
    assert [(each["name"], each["args"]) for each in merged.tool_calls] == [(call["name"], call["args"])]
    gave = get_weather.invoke(call)
    assert isinstance(gave, ToolMessage) and "18 degrees" in gave.content
    said = model.bind_tools([get_weather]).invoke([*HELLO, answer, gave])
    assert said.content or said.tool_calls
    assert said.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server, method):
    model = model_of(server, max_tokens=200).with_structured_output(Person, method=method, include_raw=True)
    answer = model.invoke("Describe a person who lives in Paris.")
    assert answer["parsing_error"] is None and isinstance(answer["parsed"], Person)
    cost_of(answer["raw"])


def test_responses(server):
    model = model_of(server, use_responses_api=True, include_response_headers=True)
    answer, same = model.invoke(HELLO), model_of(server).invoke(HELLO)
    assert answer.text == same.text
    receipt = server.receipt(answer.response_metadata["id"])
    assert answer.response_metadata["headers"]["x-obol-cost"] == receipt["cost"]["total"]
    assert answer.usage_metadata["input_tokens"] == receipt["tokens"]["prompt"]
    chunks = list(model.stream(HELLO))
    assert "".join(chunk.text for chunk in chunks) == answer.text and len(chunks) > 3
    follows = model.invoke("And of Italy?", previous_response_id=answer.response_metadata["id"])
    assert follows.usage_metadata["input_tokens"] > answer.usage_metadata["total_tokens"]


def test_embeddings(server):
    # Of ours it knows no tokenizer, so it must not split texts itself.
    model = langchain_openai.OpenAIEmbeddings(
        model="default", base_url=f"{server.url}/v1", api_key="any", check_embedding_ctx_length=False
    )
    first, second = model.embed_documents(["The cat sits on the mat.", "x"])
    assert first == model.embed_query("The cat sits on the mat.") != second


def test_errors_are_the_packages_own(server):
    with pytest.raises(openai.BadRequestError) as caught:
        model_of(server, temperature=3).invoke(HELLO)
    assert caught.value.param == "temperature"
