"""Structured output through the `openai` package: what comes back looks like what was asked for, every time."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import harness
import jsonschema
import openai
import pydantic
import pytest

ASK = [{"role": "user", "content": "Describe a person who lives in Paris."}]


def ask(client, name, **more):
    more = {"messages": ASK, "temperature": 0, "max_tokens": 200} | more
    return client.chat.completions.create(model=name, **more).choices[0]


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)
    mood: Literal["good", "bad"]


def test_pydantic_models_are_parsed(client, name):
    answer = client.chat.completions.parse(model=name, messages=ASK, response_format=Person, temperature=0)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person) and answer.choices[0].finish_reason == "stop"
    assert answer.usage.obol["status"] == "stop"
    # The package sends back what it parsed, too.
    went_on = [*ASK, answer.choices[0].message, {"role": "user", "content": "And another?"}]
    assert client.chat.completions.create(model=name, messages=went_on, max_tokens=1).choices


def test_json_objects(client, name):
    choice = ask(client, name, response_format={"type": "json_object"}, max_tokens=harness.long(400))
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.message.content.startswith("{")


def test_choices_patterns_and_grammars(client, name):
    texts = ["Paris is in France", "Paris is in Spain"]
    assert ask(client, name, extra_body={"structured_outputs": {"choice": texts}}).message.content in texts
    date = ask(client, name, extra_body={"regex": r"[12]\d{3}-[01]\d-[0-3]\d"}).message.content
    assert len(date) == 10 and date[4] == date[7] == "-"
    gbnf = 'root ::= ("<" [a-z]{1,8} ">"){3}'
    tags = ask(client, name, extra_body={"grammar": gbnf}).message.content
    assert tags.count("<") == tags.count(">") == 3 and tags.startswith("<") and tags.endswith(">")
    lark = 'start: "a" b "c"\nb: "b" | "bb"'
    assert ask(client, name, extra_body={"guided_grammar": lark}).message.content in ("abc", "abbc")
    completion = client.completions.create(
        model=name, prompt="The answer is", max_tokens=20, extra_body={"guided_regex": " (yes|no)"}
    )
    assert completion.choices[0].text in (" yes", " no")


def test_every_choice_and_every_stream_is_guided(client, name):
    form = {"structured_outputs": {"regex": "(red|green|blue), (red|green|blue)"}}
    answer = client.chat.completions.create(
        model=name, messages=ASK, n=3, temperature=1.5, seed=7, extra_body=form
    )
    colours = {"red", "green", "blue"}
    assert all(set(choice.message.content.split(", ")) <= colours for choice in answer.choices)
    streamed = client.chat.completions.create(
        model=name, messages=ASK, n=3, temperature=1.5, seed=7, extra_body=form, stream=True
    )
    texts = ["", "", ""]
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_what_cannot_be_followed_is_refused(client, name):
    def refusal(**more) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, name, **more)
        return caught.value

    impossible = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}
    impossible |= {"required": ["a"]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": impossible}}
    error = refusal(response_format=schema)
    assert error.param == "response_format" and "unsatisfiable" in error.message, error
    error = refusal(extra_body={"regex": "("})
    assert error.param == "regex" and "unclosed" in error.message, error
    error = refusal(extra_body={"regex": "a", "ignore_eos": True})
    assert error.param == "ignore_eos", error
    error = refusal(extra_body={"regex": "a", "min_tokens": 3})
    assert error.param == "min_tokens", error


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """A schema of which every value is short."""
    kinds = ["string", "integer", "boolean", "enum", "null", "const"]
    if depth < 3:
        kinds += ["object", "array", "anyOf"] * 2
    match rng.choice(kinds) if depth else "object":
        case "string":
            return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)}
        case "integer":
            least = rng.randrange(-1000, 1000)
            return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(500)}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": rng.sample(["red", "green", 1, 2.5, None, "it's \"so\"", "日本"], rng.randrange(1, 5))}
        case "null":
            return {"type": "null"}
        case "const":
            return {"const": rng.choice(["fixed", 42, {"a": [1, 2]}])}
        case "array":
            least = rng.randrange(3)
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
        case "object":
            names = rng.sample(["name", "age", "tags", "address", "kind", "is_ok", "x y", "é"], rng.randrange(1, 5))
            properties = {name: random_schema(rng, depth + 1) for name in names}
            required = [name for name in names if rng.random() < 0.8]
            return {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }


PROMPTS = ["Tell me about yourself.", "Write a poem.", "What is 2 + 2?", "Say anything but JSON.", "日本語で答えて。"]


@pytest.mark.real_model
def test_two_hundred_random_schemas_are_kept_to(client, name):
    rng = random.Random(20261122)
    cases = [(random_schema(rng), rng.choice(PROMPTS), rng.choice([0, 0.7, 1.5])) for _ in range(200)]

    def run(case) -> str | None:
        schema, prompt, temperature = case
        choice = ask(
            client,
            name,
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
            temperature=temperature,
            max_tokens=1000,
            seed=1,
        )
        try:
            jsonschema.validate(json.loads(choice.message.content), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{choice.finish_reason} {schema} {choice.message.content!r}: {error}"
        return None

    with ThreadPoolExecutor(8) as pool:
        wrong = [found for found in pool.map(run, cases) if found]
    print(f"{len(cases) - len(wrong)} of {len(cases)} answers are valid")
    assert not wrong, wrong[:3]
