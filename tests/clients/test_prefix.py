"""The prefix cache: what was computed once is not computed, nor charged, again."""

import random

WORDS = "sea wind stone light house road tree river bird cloud rain field winter summer morning night".split()


def prompt(seed: int, tail: str) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(400)) + tail


def test_a_shared_prefix_is_computed_once(server, name, say):
    def usage(text: str) -> dict:
        return server.ok(
            "/v1/completions", {"model": name, "prompt": text, "max_tokens": 4, "temperature": 0}
        )["usage"]

    first = usage(prompt(1, " The first question: where is the boat?"))
    second = usage(prompt(1, " Another one: who keeps the light?"))
    assert first["prompt_tokens_details"]["cached_tokens"] < 32
    assert second["prompt_tokens_details"]["cached_tokens"] > 350
    spent = [int(u["obol"]["device_ns"]["prefill"]) for u in (first, second)]
    say(f"prefill device time: {spent[0]} ns, then {spent[1]} ns: {spent[1] / spent[0]:.3f} of the first")
    assert 3 * spent[1] < spent[0]


def test_the_cache_changes_no_token(server, name):
    body = {"model": name, "prompt": prompt(2, " And so"), "max_tokens": 16, "temperature": 0, "logprobs": 1}
    cold, warm = (server.ok("/v1/completions", body) for _ in range(2))
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 350
    assert cold["choices"] == warm["choices"]


def test_a_cached_prompt_still_computes_one_token(server, name):
    body = {"model": name, "prompt": prompt(3, ""), "max_tokens": 1}
    server.ok("/v1/completions", body)
    again = server.ok("/v1/completions", body)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]
