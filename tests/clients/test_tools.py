"""Tools through the `openai` package: what must be called is called, in streams too, and the answer is read back."""

import json

import openai
import pytest

ASK = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
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
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "maxProperties": 0}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def chat(client, name, **more):
    more = {"messages": ASK, "temperature": 0, "tools": [WEATHER, TIME], "max_tokens": 300} | more
    return client.chat.completions.create(model=name, **more)


def is_weather(arguments: str) -> bool:
    read = json.loads(arguments)
    return set(read) == {"city", "unit"} and read["unit"] in ("celsius", "fahrenheit")


def test_a_named_function_is_called_with_its_arguments(client, name):
    choice = chat(client, name, tool_choice=NAMED).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather" and is_weather(call.function.arguments)


def test_required_calls_name_tools(client, name):
    message = chat(client, name, tool_choice="required", max_tokens=600).choices[0].message
    assert message.tool_calls
    assert {call.function.name for call in message.tool_calls} <= {"get_weather", "get_time"}
    one = chat(client, name, tool_choice="required", parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1


def test_calls_are_streamed(client, name):
    whole = chat(client, name, tool_choice=NAMED).choices[0].message.tool_calls[0]
    chunks = list(chat(client, name, tool_choice=NAMED, stream=True))
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert deltas[0].function.name == "get_weather" and deltas[0].id and deltas[0].index == 0
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    arguments = "".join(delta.function.arguments for delta in deltas)
    assert arguments == whole.function.arguments and len(deltas) > 3
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "tool_calls"
    with client.chat.completions.stream(
        model=name, messages=ASK, tools=[WEATHER], tool_choice=NAMED, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert is_weather(final.choices[0].message.tool_calls[0].function.arguments)


def test_what_a_tool_gave_is_read(client, name):
    called = chat(client, name, tool_choice=NAMED).choices[0].message
    gave = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": '{"celsius": 18}'}
    for tools in ([WEATHER], openai.NOT_GIVEN):
        answer = chat(client, name, messages=[*ASK, called, gave], tools=tools, tool_choice=openai.NOT_GIVEN)
        message = answer.choices[0].message
        assert message.content or message.tool_calls
    longer = client.post(
        "/chat/completions",
        body={"model": name, "messages": [*ASK, called.model_dump(), gave], "tools": [WEATHER], "max_tokens": 1},
        cast_to=dict,
    )
    shorter = client.post(
        "/chat/completions", body={"model": name, "messages": ASK, "tools": [WEATHER], "max_tokens": 1}, cast_to=dict
    )
    assert longer["usage"]["prompt_tokens"] > shorter["usage"]["prompt_tokens"] + 20


def test_the_choice_none_leaves_the_tools_out(client, name):
    without = chat(client, name, tools=openai.NOT_GIVEN, max_tokens=20)
    none = chat(client, name, tool_choice="none", max_tokens=20)
    assert none.choices[0].message.content == without.choices[0].message.content
    assert none.usage.prompt_tokens == without.usage.prompt_tokens


def test_an_answer_goes_on_with_the_last_message(client, name):
    messages = [*ASK, {"role": "assistant", "content": "The weather in Paris is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    went_on = chat(client, name, messages=messages, tools=openai.NOT_GIVEN, extra_body=extra, max_tokens=20)
    anew = chat(client, name, messages=messages, tools=openai.NOT_GIVEN, max_tokens=20)
    assert went_on.usage.prompt_tokens < anew.usage.prompt_tokens
    assert went_on.choices[0].message.content.startswith(" ")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}, "continue_final_message"),
        ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ],
)
def test_what_cannot_be_called_is_refused(client, name, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, name, **more)
    assert caught.value.param == param, caught.value
