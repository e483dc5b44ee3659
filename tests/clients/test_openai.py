"""The real `openai` package against the server: what an existing program would do."""

import math

import harness
import openai
import pytest
from conftest import CONTEXT

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def test_models_are_listed_and_found_by_id(client, name):
    listed = client.models.list().data
    assert [m.id for m in listed] and listed[0].object == "model"
    assert client.models.retrieve(name).id == name


@pytest.mark.real_model
def test_chat(client, name, golden):
    messages = golden[0]["messages"]
    answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=32)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, "as llama.cpp answers: tests/golden/greedy.json"
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.object == "chat.completion" and answer.id
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 32
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_the_alias_default_names_the_model(client):
    answer = client.chat.completions.create(model="default", messages=HELLO, max_tokens=2)
    assert answer.choices[0].message.content


def test_text_parts_and_the_developer_role(client, name):
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

    def text(role: str, content) -> str:
        messages = [{"role": role, "content": system}, {"role": "user", "content": content}]
        answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12)
        return answer.choices[0].message.content

    assert text("developer", parts) == text("system", "What is the capital\nof France?")


def test_streamed_chat_with_usage(client, name):
    stream = client.chat.completions.create(
        model=name,
        messages=HELLO,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *content, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in content)
    assert len({chunk.id for chunk in chunks}) == 1
    assert content[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in content if c.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    whole = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=24)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in content)
    assert text == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_streamed_chat_without_usage_has_it_on_the_last_chunk(client, name):
    chunks = list(client.chat.completions.create(model=name, messages=HELLO, max_tokens=8, stream=True))
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert len(with_usage) == 1 and with_usage[0] is chunks[-1]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_completions(client, name):
    answer = client.completions.create(model=name, prompt="Once upon a time", temperature=0, max_tokens=16)
    assert answer.object == "text_completion" and answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    pieces = client.completions.create(
        model=name, prompt="Once upon a time", temperature=0, max_tokens=16, stream=True
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == answer.choices[0].text


def test_two_choices(client, name):
    answer = client.chat.completions.create(
        model=name, messages=HELLO, n=2, temperature=1.2, seed=3, max_tokens=16
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first != second, "choices draw from their own numbers"
    assert answer.usage.completion_tokens > 16 or any(c.finish_reason == "stop" for c in answer.choices)
    stream = client.chat.completions.create(
        model=name, messages=HELLO, n=2, temperature=1.2, seed=3, max_tokens=16, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in sorted(answer.choices, key=lambda c: c.index)]


def test_greedy_choices_are_equal(client, name):
    answer = client.completions.create(model=name, prompt="The sea is", n=2, temperature=0, max_tokens=8)
    assert answer.choices[0].text == answer.choices[1].text


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings(client, name, streamed):
    request = {"model": name, "prompt": "One, two, three, four,", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**request).choices[0].text
    # A stop string that begins inside a token and ends inside another.
    middle = free[9:14]
    assert len(middle) == 5
    if streamed:
        chunks = list(client.completions.create(**request, stop=[middle, "never seen"], stream=True))
        text = "".join(c.choices[0].text for c in chunks if c.choices)
        reason = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    else:
        choice = client.completions.create(**request, stop=[middle, "never seen"]).choices[0]
        text, reason = choice.text, [choice.finish_reason]
    assert text == free[: free.index(middle)]
    assert reason == ["stop"]


def test_chat_logprobs(client, name):
    answer = client.chat.completions.create(
        model=name, messages=HELLO, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert (
        "".join(bytes(p.bytes).decode(errors="replace") for p in content) == answer.choices[0].message.content
    )
    for position in content:
        assert len(position.top_logprobs) == 3
        ranked = [top.logprob for top in position.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(math.exp(p) for p in ranked) <= 1.0001
        assert position.token == position.top_logprobs[0].token, "greedy takes the most likely"
        assert position.logprob == position.top_logprobs[0].logprob


def test_completion_logprobs(client, name):
    answer = client.completions.create(
        model=name, prompt="Once upon a time", temperature=0, max_tokens=8, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) <= 3
    assert all(p <= 0 for p in found.token_logprobs)


def test_a_seed_repeats_the_text(client, name):
    def text(seed: int) -> str:
        answer = client.chat.completions.create(
            model=name, messages=HELLO, temperature=1.5, seed=seed, max_tokens=24
        )
        return answer.choices[0].message.content

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


def test_the_receipts_seed_repeats_an_unseeded_request(client, server, name):
    request = {"model": name, "messages": HELLO, "temperature": 1.5, "max_tokens": 24}
    first = client.chat.completions.with_raw_response.create(**request)
    seed = server.receipt(first.headers["x-request-id"])["seed"]
    again = client.chat.completions.create(**request, seed=int(seed))
    assert again.choices[0].message.content == first.parse().choices[0].message.content


def test_bad_values_are_bad_request_errors(client, name):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_over_the_context_names_both_lengths(client, server, name):
    text = "word " * (CONTEXT + 100)
    length = len(server.ok("/tokenize", {"model": name, "prompt": text})["tokens"])
    assert length > CONTEXT
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=name, prompt=text, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert str(length) in caught.value.message and str(CONTEXT) in caught.value.message


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_no_op_values_of_every_field_are_accepted(client, name):
    answer = client.chat.completions.create(
        model=name,
        messages=HELLO,
        max_completion_tokens=4,
        store=False,
        tools=[],
        response_format={"type": "text"},
        user="someone",
        metadata={"run": "1"},
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        n=1,
        top_p=1,
        parallel_tool_calls=None,
    )
    assert answer.choices[0].message.content is not None


def test_penalties_bias_and_filters_change_what_is_drawn(client, name):
    # A prompt that the model goes on repeating, which is what penalties are for.
    text = "The cat sat on the mat. " * 8
    request = {"model": name, "prompt": text, "temperature": 0, "max_tokens": 24}
    plain = client.completions.create(**request).choices[0].text
    penalised = client.completions.create(**request, frequency_penalty=2, presence_penalty=2)
    assert penalised.choices[0].text != plain
    forced = client.completions.create(**request, logit_bias={"28": 100}).choices[0].text
    assert forced == "," * 24
    # top_k 1 is greedy whatever the temperature.
    single = {**request, "temperature": 1.9, "extra_body": {"top_k": 1}}
    assert client.completions.create(**single).choices[0].text == plain


def test_several_prompts_are_one_request(client, name):
    prompts = ["The capital of France is", "Once upon a time", "2 + 2 ="]
    answer = client.completions.create(model=name, prompt=prompts, n=2, temperature=0, max_tokens=6)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = [
        client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=6) for prompt in prompts
    ]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert answer.usage.obol["tokens"]["completion"] == answer.usage.completion_tokens
    streamed = ["", "", ""]
    for chunk in client.completions.create(model=name, prompt=prompts, temperature=0, max_tokens=6, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [one.choices[0].text for one in alone]


def test_prompts_are_echoed(client, name):
    prompts = ["The capital of France is", "2 + 2 ="]
    plain = client.completions.create(model=name, prompt=prompts, temperature=0, max_tokens=4)
    echoed = client.completions.create(model=name, prompt=prompts, temperature=0, max_tokens=4, echo=True)
    for prompt, one, other in zip(prompts, plain.choices, echoed.choices, strict=True):
        assert other.text == prompt + one.text
    texts = ["", ""]
    for chunk in client.completions.create(
        model=name, prompt=prompts, temperature=0, max_tokens=4, echo=True, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in echoed.choices]


def test_the_best_of_several_answers_is_shown(client, name):
    asked = {"model": name, "prompt": "My favourite colour is", "temperature": 1.2, "max_tokens": 5, "seed": 3}
    every = client.completions.create(**asked, n=4, logprobs=0)

    def likely(choice) -> float:
        scores = choice.logprobs.token_logprobs
        return sum(scores) / len(scores)

    ranked = sorted(every.choices, key=likely, reverse=True)
    best = client.completions.create(**asked, n=2, best_of=4)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == every.usage.completion_tokens, "all four are paid for"


def test_prompts_are_scored_as_answers_are(client, name):
    said = client.completions.create(
        model=name, prompt="The capital of France is", temperature=0, max_tokens=40, logprobs=2
    )
    whole = "The capital of France is" + said.choices[0].text
    asked = {"model": name, "prompt": [whole, "2 + 2 ="], "max_tokens": 1, "temperature": 0}
    if "--device" in harness.flags_of_all():
        # A device that draws its tokens itself keeps its logits.
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**asked, echo=True, logprobs=2)
        assert caught.value.param == "echo"
        return
    scored = client.completions.create(**asked, echo=True, logprobs=2)
    first, second = (choice.logprobs for choice in scored.choices)
    assert first.token_logprobs[0] is None and first.top_logprobs[0] is None
    # The very same rows: a prompt's and an answer's logits do not depend on how they are computed.
    generated = said.choices[0].logprobs
    begins = said.usage.prompt_tokens
    ends = begins + len(generated.tokens)
    assert first.tokens[begins:ends] == generated.tokens
    assert first.token_logprobs[begins:ends] == generated.token_logprobs
    assert first.top_logprobs[begins:ends] == generated.top_logprobs
    assert first.text_offset[0] == 0 and second.text_offset[0] == 0
    for logprobs, choice in zip((first, second), scored.choices, strict=True):
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked, echo=True, logprobs=0, stream=True)
    assert caught.value.param == "echo"
