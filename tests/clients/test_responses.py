"""OpenAI's responses through the real `openai` package: what an existing program would do, what is kept, what it costs."""

import contextlib
import json
import os
import threading
import time
from typing import Literal

import harness
import openai
import pydantic
import pytest

HELLO = "What is the capital of France?"
ADMIN = "sk-admin-of-the-client-tests"
KILL_ROUNDS = int(os.environ.get("OBOL_KILL_ROUNDS", "3"))
SMALL = ("--max-model-len", "1024", "--kv-memory", "64MiB")
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


def client_of(server, key="any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300)


def create(client, name, **more):
    more = {"model": name, "input": HELLO, "max_output_tokens": 24, "temperature": 0} | more
    return client.responses.create(**more)


def cost_of(response) -> dict:
    """The receipt in a response."""
    extra = response.usage.model_extra
    assert extra["cost"] == pytest.approx(float(extra["obol"]["cost"]["total"])) and extra["cost"] > 0
    return extra["obol"]


def strictly(value) -> None:
    """Whether an answer is of the package's types, which it does not check by itself."""
    type(value).model_validate(value.model_dump(by_alias=True, warnings=False))


def test_a_response_and_its_cost(client, server, name):
    raw = client.responses.with_raw_response.create(
        model=name, input=HELLO, max_output_tokens=24, temperature=0, user="ada", metadata={"run": "7"}
    )
    response = raw.parse()
    strictly(response)
    chat = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": HELLO}], temperature=0, max_tokens=24
    )
    assert response.output_text == chat.choices[0].message.content != ""
    assert response.status in ("completed", "incomplete") and response.metadata == {"run": "7"}
    receipt = cost_of(response)
    assert receipt == server.receipt(raw.headers["x-request-id"]) == server.receipt(response.id)
    assert raw.headers["x-obol-cost"] == receipt["cost"]["total"]
    assert receipt["user"] == "ada"
    usage, tokens = response.usage, receipt["tokens"]
    assert usage.input_tokens == tokens["prompt"] and usage.output_tokens == tokens["completion"]
    assert usage.input_tokens_details.cached_tokens == tokens["cached"]
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    cut = create(client, name, max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_all_its_events_in_order(client, server, name):
    # What has this form comes to its end.
    sentence = {"max_output_tokens": 200, "extra_body": {"temperature": 0, "regex": "[A-Z][a-z ]{20,40}[.]"}}
    whole = create(client, name, **sentence)
    assert whole.status == "completed"
    events = list(create(client, name, **sentence, stream=True))
    for event in events:
        strictly(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert "".join(event.delta for event in events[4 : 4 + deltas]) == whole.output_text
    receipt = cost_of(last)
    assert receipt == server.receipt(receipt["request_id"])
    with client.responses.stream(model=name, input=HELLO, **sentence) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == whole.output_text


def test_log_probabilities(client, name):
    response = create(client, name, include=["message.output_text.logprobs"], top_logprobs=3, max_output_tokens=5)
    [part] = response.output[0].content
    assert len(part.logprobs) == 5 and all(len(entry.top_logprobs) == 3 for entry in part.logprobs)
    assert "".join(entry.token for entry in part.logprobs) == response.output_text


def test_a_forced_tool_is_called_and_its_result_read(client, name):
    choice = {"type": "function", "name": "get_weather"}
    forced = {"tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 200}
    response = create(client, name, **forced)
    strictly(response)
    [call] = response.output
    assert call.type == "function_call" and call.name == "get_weather" and call.status == "completed"
    arguments = json.loads(call.arguments)
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")
    events = list(create(client, name, **forced, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added"),
        *["function_call_arguments.delta"] * len(deltas),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert len(deltas) > 3 and "".join(deltas) == call.arguments == events[-3].arguments
    gave = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    # By hand, as stateless programs do; and going on from what is kept.
    by_hand = create(client, name, input=[{"role": "user", "content": HELLO}, *response.output, gave], tools=[WEATHER])
    kept = create(client, name, previous_response_id=response.id, input=[gave], tools=[WEATHER])
    assert by_hand.output and kept.usage.input_tokens == by_hand.usage.input_tokens
    required = create(client, name, **forced | {"tool_choice": "required", "parallel_tool_calls": False})
    assert [item.type for item in required.output] == ["function_call"]
    other = WEATHER | {"name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    chosen = create(client, name, **forced | {"tools": [WEATHER, other], "tool_choice": allowed})
    assert {item.name for item in chosen.output} == {"other"}


def test_an_answer_in_a_schemas_form(client, name):
    parsed = client.responses.parse(model=name, input=HELLO, text_format=Place, max_output_tokens=60)
    assert parsed.output_parsed.city in ("Paris", "Rome")
    with client.responses.stream(model=name, input=HELLO, text_format=Place, max_output_tokens=60) as stream:
        assert stream.get_final_response().output_parsed.city in ("Paris", "Rome")


def test_a_conversation_goes_on_over_a_restart(start):
    own = start(*SMALL)
    first = create(client_of(own), "default", instructions="Answer in one word.")
    second = create(client_of(own), "default", input="And of Italy?", previous_response_id=first.id)
    said = [{"role": "user", "content": HELLO}, *first.output, {"role": "user", "content": "And of Italy?"}]
    by_hand = create(client_of(own), "default", input=said, store=False)
    assert by_hand.usage.input_tokens == second.usage.input_tokens and by_hand.output_text == second.output_text
    unfinished = create(client_of(own), "default", stream=True)
    assert next(iter(unfinished)).type == "response.created"
    own.kill()
    own.start()
    client = client_of(own)
    assert client.responses.retrieve(second.id) == second
    third = create(client, "default", input="And of Spain?", previous_response_id=second.id)
    counted = client.responses.input_tokens.count(
        model="default", input="And of Spain?", previous_response_id=second.id
    )
    assert third.usage.input_tokens == counted.input_tokens > second.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_hand.id)
    [item] = client.responses.input_items.list(third.id)
    strictly(item)
    assert item.content[0].text == "And of Spain?"
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, "default", previous_response_id=third.id)
    assert caught.value.code == "previous_response_not_found" and second.id in caught.value.message
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(third.id)
    assert own.stop() == 0, own.log()
    own.audit()


def test_what_is_kept_is_its_keys_and_goes_with_its_time(start, tmp_path):
    (tmp_path / "admin").write_text(ADMIN)
    config = tmp_path / "obol.toml"
    own = start(*SMALL, "--admin-key-file", str(tmp_path / "admin"))
    bearer = {"authorization": f"Bearer {ADMIN}"}
    one, two = (own.ok("/key/generate", {"team_id": "same"}, bearer)["key"] for _ in range(2))
    kept = create(client_of(own, one), "default")
    assert cost_of(kept)["key_id"]
    for stranger in (two, ADMIN):
        with pytest.raises(openai.NotFoundError):
            client_of(own, stranger).responses.retrieve(kept.id)
        with pytest.raises(openai.BadRequestError) as caught:
            create(client_of(own, stranger), "default", previous_response_id=kept.id)
        assert caught.value.param == "previous_response_id"
    assert client_of(own, one).responses.retrieve(kept.id).output_text == kept.output_text
    assert own.stop() == 0, own.log()
    config.write_text("[responses]\ndays = 0\n")
    own.start("--config", str(config))
    with pytest.raises(openai.NotFoundError):
        client_of(own, one).responses.retrieve(kept.id)
    assert create(client_of(own, one), "default").model_extra["store"] is False
    with pytest.raises(openai.BadRequestError) as caught:
        create(client_of(own, one), "default", store=True)
    assert caught.value.param == "store"
    assert own.stop() == 0, own.log()
    # Nothing of what was said is left on the disk.
    for path in own.data_dir.rglob("*"):
        assert path.is_dir() or HELLO.encode() not in path.read_bytes(), path


def test_errors_are_the_packages_own(client, name):
    for more, param in (
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"input": "a " * 5000}, "input"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"extra_body": {"shape": "round"}}, "shape"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, name, **more)
        assert caught.value.param == param, caught.value
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, "no-such-model")
    assert caught.value.code == "model_not_found"


def test_a_client_that_hangs_up_leaves_one_settled_receipt(client, server, name):
    tokens = harness.long(1500)
    stream = create(client, name, stream=True, max_output_tokens=tokens, extra_body={"ignore_eos": True})
    request = stream.response.headers["x-request-id"]
    seen = 0
    with contextlib.closing(stream):
        for event in stream:
            seen += event.type == "response.output_text.delta"
            if seen == 3:
                break
    server.wait_idle()
    receipt = server.receipt(request)
    assert receipt["status"] == "cancelled" and 0 < receipt["tokens"]["completion"] < tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(f"resp_{request}")
    server.audit()


def answered_until_dead(own, answered: list) -> None:
    """Goes on with one conversation, whole and as a stream, and notes each response that was told to be there."""
    client, before = client_of(own), None
    with contextlib.suppress(openai.APIConnectionError):
        while True:
            more = {"input": "a", "max_output_tokens": 1, "previous_response_id": before}
            answered.append(create(client, "default", **more))
            answered.append(list(create(client, "default", **more, stream=True))[-1].response)
            before = answered[-1].id if len(answered) % 8 else None


def test_what_was_answered_is_there_after_kill_9(start):
    own = start(*SMALL)
    answered = []
    for round_ in range(KILL_ROUNDS):
        clients = [threading.Thread(target=answered_until_dead, args=(own, answered)) for _ in range(4)]
        for client in clients:
            client.start()
        before = len(answered)
        deadline = time.monotonic() + 60
        while len(answered) < before + 10 * (round_ + 1):
            assert time.monotonic() < deadline, own.log()
            time.sleep(0.01)
        own.kill()
        for client in clients:
            client.join()
        own.start()
        for response in answered:
            assert response.status in ("completed", "incomplete")
            assert client_of(own).responses.retrieve(response.id) == response
            assert own.receipt(response.id) == cost_of(response)
    assert create(client_of(own), "default", previous_response_id=answered[-1].id).output_text
    assert own.stop() == 0, own.log()
    own.audit()
