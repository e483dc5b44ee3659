"""Budgets, limits and ceilings as real clients meet them, with the real model: a crowd on one key, an agent that runs
away, and kill -9 between charges.
"""

import asyncio
import concurrent.futures
import decimal
import random
import re
import threading
import time

import harness
import httpx
import openai
import pytest
from test_keys import ADMIN, HELLO, admin, client, order

SMALL = ("--max-model-len", "512", "--kv-memory", "64MiB")
REFUSAL = re.compile(r"refused by a budget.* spent=(\d+) leased=(\d+) wanted=(\d+) cap=(\d+) ended=false")


def picos(amount: str) -> int:
    return int(decimal.Decimal(amount) * 10**12)


def start(tmp_path, config: str = "", **environment) -> harness.Server:
    file = tmp_path / "obol.toml"
    file.write_text(config)
    own = harness.Server(
        tmp_path / "data", *SMALL, "--config", str(file), OBOL_ADMIN_KEY=ADMIN, NO_COLOR="1", **environment
    )
    return own.start()


def receipts_of(own: harness.Server, key_id: str) -> list[dict]:
    found, after = [], None
    with admin(own) as http:
        while True:
            query = {"key_id": key_id, "limit": 1000} | ({"after": after} if after else {})
            page = http.get("/v1/requests", params=query).json()
            found += page["data"]
            if not page["has_more"]:
                return found
            after = page["data"][-1]["request_id"]


def test_a_thousand_clients_on_one_key_are_charged_no_more_than_its_budget(tmp_path):
    cap = "0.00006"
    own = start(tmp_path)
    with admin(own) as http:
        key = order(http, "/key/generate", max_budget=cap)
    body = {"model": "default", "messages": HELLO, "max_tokens": 24, "ignore_eos": True}

    async def all_at_once() -> list[tuple[int, dict]]:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {key['key']}"}
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=300) as http:

            async def ask() -> tuple[int, dict]:
                answer = await http.post(f"{own.url}/v1/chat/completions", json=body)
                return answer.status_code, answer.json()

            return await asyncio.gather(*(ask() for _ in range(1000)))

    answers = asyncio.run(all_at_once())
    charged, cut, whole, refused = 0, 0, 0, 0
    for status, answer in answers:
        if status == 200:
            charged += picos(answer["usage"]["obol"]["cost"]["total"])
            if answer["choices"][0].get("stop_reason") == "budget":
                cut += 1
                assert answer["choices"][0]["finish_reason"] == "length"
            else:
                whole += 1
        else:
            assert status == 429 and answer["error"]["code"] == "budget_exceeded", answer
            refused += 1
    assert 0 < charged <= picos(cap), (charged, cap)
    receipts = receipts_of(own, key["key_id"])
    assert sum(picos(receipt["cost"]["total"]) for receipt in receipts) == charged
    with admin(own) as http:
        info = http.get("/key/info", params={"key": key["key"]}).json()["info"]
    assert round(info["spend"] * 10**12) == charged
    refusals = REFUSAL.findall(own.log_path.read_text())
    assert len(refusals) >= refused > 0, "each refusal is in the log"
    for spent, leased, wanted, limit in (map(int, figures) for figures in refusals):
        assert limit == picos(cap) and spent + leased + wanted > limit, "and each is justified"
    assert own.stop() == 0
    assert "difference 0" in own.audit()
    print(f"\n{charged} of {picos(cap)} picos charged: {whole} whole, {cut} cut mid-answer, {refused} refused")


def test_the_openai_package_gets_its_exception_and_does_not_try_again(tmp_path):
    own = start(tmp_path)
    with admin(own) as http:
        spent = order(http, "/key/generate", max_budget="0.000000000001")
        slow = order(http, "/key/generate", rpm_limit=1)
    tries = []
    patient = openai.OpenAI(
        base_url=f"{own.url}/v1",
        api_key=spent["key"],
        max_retries=5,
        http_client=httpx.Client(event_hooks={"request": [tries.append]}, timeout=60),
    )
    for stream in (False, True):
        tries.clear()
        with pytest.raises(openai.RateLimitError) as caught:
            patient.chat.completions.create(model="default", messages=HELLO, stream=stream)
        assert caught.value.code == "budget_exceeded" and caught.value.type == "insufficient_quota"
        assert len(tries) == 1, "a spent budget is not tried again"
    client(own, slow["key"]).chat.completions.create(model="default", messages=HELLO, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as caught:
        client(own, slow["key"]).chat.completions.create(model="default", messages=HELLO, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
    assert own.stop() == 0


def test_an_agent_that_runs_away_is_halted_and_its_team_goes_on(tmp_path):
    own = start(tmp_path, '[tasks]\nmax_cost = "0.00001"\nmax_calls = 50\n')
    with admin(own) as http:
        key = order(http, "/key/generate", team_id="agents")
    ours = client(own, key["key"])
    runaway = ours.with_options(default_headers={"x-obol-task": "runaway"})
    said, calls = ["begin"], 0
    with pytest.raises(openai.RateLimitError) as caught:
        for calls in range(1000):
            messages = [{"role": "user", "content": f"Step {calls}, after {said[-1]!r}: what next?"}]
            answer = runaway.chat.completions.create(model="default", messages=messages, max_tokens=16)
            said.append(answer.choices[0].message.content)
    assert caught.value.code == "budget_exceeded" and "task" in caught.value.message, caught.value.message
    assert calls < 50
    others = ours.with_options(default_headers={"x-obol-task": "steady"})
    assert others.chat.completions.create(model="default", messages=HELLO, max_tokens=4).choices
    with httpx.Client(headers={"authorization": f"Bearer {key['key']}"}) as http:
        task = http.get(f"{own.url}/v1/tasks/runaway").json()
    assert 0 < picos(task["cost"]) <= picos("0.00001") and task["calls"] == task["settled"] >= calls, task
    assert own.stop() == 0
    assert "difference 0" in own.audit()


def test_a_budget_is_the_same_after_kill_9(tmp_path):
    config = '[[budgets]]\nscope = "team"\ncap = "0.00002"\nwindow = "lifetime"\n'
    own = start(tmp_path, config)
    with admin(own) as http:
        key = order(http, "/key/generate", team_id="red")
    dice = random.Random(7)
    body = {"model": "default", "messages": HELLO, "max_tokens": 30, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key['key']}"}
    acknowledged: dict[str, int] = {}

    def ask() -> int:
        try:
            answer = httpx.post(f"{own.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        except httpx.TransportError:
            return 0
        if answer.status_code == 200:
            receipt = answer.json()["usage"]["obol"]
            acknowledged[receipt["request_id"]] = picos(receipt["cost"]["total"])
        return answer.status_code

    for _ in range(3):
        killer = threading.Timer(dice.uniform(0.2, 1.2), own.kill)
        killer.start()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(6):
                list(pool.map(lambda _: ask(), range(4)))
        killer.join()
        own.start()
    deadline = time.monotonic() + 120
    while ask() == 200:
        assert time.monotonic() < deadline, "the budget is never spent"
    booked = {r["request_id"]: picos(r["cost"]["total"]) for r in receipts_of(own, key["key_id"]) if r["status"] != "error"}
    assert acknowledged.items() <= booked.items(), "what was acknowledged is in the books"
    assert sum(booked.values()) <= picos("0.00002"), "over all starts together"
    assert own.stop() == 0
    assert "difference 0" in own.audit()


@pytest.mark.parametrize("beside", [False, True], ids=["admin-api", "command-line"])
def test_a_budget_counts_the_requests_that_run_when_it_is_set(tmp_path, beside):
    own = start(tmp_path)
    with admin(own) as http:
        key = order(http, "/key/generate")
        cap = "0.000000000001"
        stream = client(own, key["key"]).chat.completions.create(
            model="default", messages=HELLO, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = iter(stream)
        next(pieces)
        if beside:
            flags = ("--max-budget", cap, "--data-dir", str(own.data_dir))
            done = harness.run("keys", "update", key["key_id"], *flags)
            assert done.returncode == 0, done.stderr
        else:
            order(http, "/key/update", key=key["key"], max_budget=cap)
        last = [piece.model_extra.get("usage") or piece.usage for piece in pieces][-1]
    receipts = receipts_of(own, key["key_id"])
    assert [receipt["status"] for receipt in receipts] == ["budget"], last
    assert receipts[0]["tokens"]["completion"] < 400
    gauge = own.metrics().values("obol_budget_spent")
    spent = [value for labels, value in gauge if labels["value"] == key["key_id"]]
    assert [round(value * 10**12) for value in spent] == [picos(receipts[0]["cost"]["total"])]
    assert own.stop() == 0
    assert "difference 0" in own.audit()
