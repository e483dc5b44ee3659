"""The real `anthropic` package against `/v1/messages`: what an existing program would do, and what it costs."""

import contextlib

import anthropic
import pytest

HELLO = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
ADMIN = "sk-admin-of-the-client-tests"


def client_of(server, key="any") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def claude(server) -> anthropic.Anthropic:
    return client_of(server)


def create(client, name, **more):
    more = {"model": name, "messages": HELLO, "max_tokens": 24, "extra_body": GREEDY} | more
    return client.messages.create(**more)


def cost_of(message) -> dict:
    """The receipt in an answer."""
    extra = message.usage.model_extra
    assert extra["cost"] == pytest.approx(float(extra["obol"]["cost"]["total"])) and extra["cost"] > 0
    return extra["obol"]


def text_of(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_and_its_cost(claude, client, server, name):
    message = create(claude, name, metadata={"user_id": "ada"})
    chat = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=24)
    assert text_of(message) == chat.choices[0].message.content != ""
    assert message.role == "assistant" and message.type == "message" and message.id.startswith("msg_")
    assert message.stop_reason in ("end_turn", "max_tokens")
    receipt = cost_of(message)
    assert receipt == server.receipt(message._request_id)
    assert receipt["user"] == "ada"
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == receipt["tokens"]["prompt"]
    assert usage.cache_creation_input_tokens == 0 and usage.output_tokens == receipt["tokens"]["completion"]


def test_a_prefix_that_was_read_before_is_told_as_cached(claude, name):
    system = [{"type": "text", "text": "Answer in one word. " * 30, "cache_control": {"type": "ephemeral"}}]
    create(claude, name, system=system, max_tokens=1)
    again = create(claude, name, system=system, max_tokens=1).usage
    assert again.cache_read_input_tokens > 100 > again.input_tokens


def test_a_stream_gives_the_same_message(claude, server, name):
    whole = create(claude, name)
    with claude.messages.stream(model=name, messages=HELLO, max_tokens=24, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    events = list(create(claude, name, stream=True))
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
    last = next(event for event in events if event.type == "message_delta")
    receipt = cost_of(last)
    assert receipt == server.receipt(receipt["request_id"])
    tokens = receipt["tokens"]
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == tokens["prompt"]


def test_stop_sequences_are_named(claude, name):
    free = text_of(create(claude, name))
    word = free.split()[1]
    message = create(claude, name, stop_sequences=["never said", word])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == word
    assert text_of(message) == free[: free.index(word)]


def test_a_forced_tool_is_used_and_its_result_read(claude, name):
    choice = {"type": "tool", "name": "get_weather"}
    message = create(claude, name, tools=[WEATHER], tool_choice=choice, max_tokens=200)
    assert message.stop_reason == "tool_use"
    [block] = message.content
    assert block.type == "tool_use" and block.name == "get_weather"
    assert set(block.input) == {"city", "unit"} and block.input["unit"] in ("celsius", "fahrenheit")
    with claude.messages.stream(
        model=name, messages=HELLO, max_tokens=200, tools=[WEATHER], tool_choice=choice, extra_body=GREEDY
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(pieces) > 3 and final.content[0].input == block.input and final.stop_reason == "tool_use"
    gave = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "18 degrees"}]}
    said = [*HELLO, {"role": "assistant", "content": message.content}, gave]
    answer = create(claude, name, messages=said, tools=[WEATHER])
    assert answer.content
    one = create(
        claude, name, tools=[WEATHER], max_tokens=200, tool_choice={"type": "any", "disable_parallel_tool_use": True}
    )
    assert [block.type for block in one.content] == ["tool_use"]


def test_the_packages_tool_runner(claude, name):
    @anthropic.beta_tool
    def get_time() -> str:
        """The time of day."""
        return "noon"

    said = claude.beta.messages.tool_runner(
        model=name, max_tokens=40, messages=HELLO, tools=[get_time], extra_body=GREEDY
    ).until_done()
    assert said.content and said.role == "assistant"


def test_an_answer_in_a_schemas_form(claude, name):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = create(claude, name, output_config=config, max_tokens=60)
    assert text_of(message).replace(" ", "").replace("\n", "") in ('{"city":"Paris"}', '{"city":"Rome"}')


def test_tokens_are_counted_as_they_are_charged(claude, name):
    for more in ({}, {"system": "Be brief."}, {"tools": [WEATHER]}):
        counted = claude.messages.count_tokens(model=name, messages=HELLO, **more).input_tokens
        receipt = cost_of(create(claude, name, max_tokens=1, **more))
        assert counted == receipt["tokens"]["prompt"]


def test_the_answer_goes_on_with_what_was_begun(claude, name):
    begun = [*HELLO, {"role": "assistant", "content": "The capital of France is"}]
    message = create(claude, name, messages=begun)
    assert text_of(message).startswith(" ")
    anew = claude.messages.count_tokens(model=name, messages=HELLO).input_tokens
    assert claude.messages.count_tokens(model=name, messages=begun).input_tokens > anew


def test_errors_are_the_packages_own(claude, name):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(claude, name, max_tokens=100_000)
    assert caught.value.type == "invalid_request_error" and "max_tokens" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(claude, name, extra_body={"shape": "round"})
    assert "`shape`" in caught.value.message
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(claude, "no-such-model")
    assert caught.value.type == "not_found_error"


def test_keys_and_limits(start, tmp_path):
    (tmp_path / "admin").write_text(ADMIN)
    own = start("--admin-key-file", str(tmp_path / "admin"))
    made = own.ok("/key/generate", {"rpm_limit": 1}, {"authorization": f"Bearer {ADMIN}"})
    for key in ("sk-obol-wrong", "wrong"):
        with pytest.raises(anthropic.AuthenticationError) as caught:
            create(client_of(own, key), "default")
        assert caught.value.type == "authentication_error"
    keyed = client_of(own, made["key"])
    assert cost_of(create(keyed, "default", max_tokens=2))["key_id"]
    with pytest.raises(anthropic.RateLimitError) as caught:
        create(keyed, "default", max_tokens=2)
    assert caught.value.type == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_client_that_hangs_up_leaves_one_settled_receipt(claude, server, name):
    extra = GREEDY | {"ignore_eos": True}
    with create(claude, name, stream=True, max_tokens=1500, extra_body=extra) as stream:
        request = stream.response.headers["x-request-id"]
        seen = 0
        with contextlib.closing(stream):
            for event in stream:
                seen += event.type == "content_block_delta"
                if seen == 3:
                    break
    server.wait_idle()
    receipt = server.receipt(request)
    assert receipt["status"] == "cancelled" and 0 < receipt["tokens"]["completion"] < 1500
    server.audit()
