"""Teams that share one server by weight, as their clients meet it: keys, real streams, the real model, and receipts."""

import asyncio
import json
import random
import time

import harness
import httpx
import pytest
from test_budgets import receipts_of
from test_keys import ADMIN, SMALL, admin, order

WORDS = "river stone cloud paper window garden bottle forest candle mirror silver morning".split()
LANES = 4


def start(tmp_path, config: str = "", *flags: str) -> harness.Server:
    file = tmp_path / "obol.toml"
    file.write_text(config)
    flags = ("--max-sequences", str(LANES), "--config", str(file), *SMALL, *flags)
    return harness.Server(tmp_path / "data", *flags, OBOL_ADMIN_KEY=ADMIN).start()


def key(own: harness.Server, team: str) -> dict:
    with admin(own) as http:
        return order(http, "/key/generate", team_id=team)


class Crowd:
    """A key's streams, all at once. What each has heard is seen in one place, so that there is one order of it."""

    def __init__(self, own: harness.Server, secret: str, seed: int):
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {secret}"}
        self.http = httpx.AsyncClient(base_url=own.url, headers=headers, limits=limits, timeout=300)
        self.dice = random.Random(seed)
        self.tasks: list[asyncio.Task] = []
        self.begun = self.done = 0

    def ask(self, words: int, tokens: int) -> asyncio.Task:
        prompt = " ".join(self.dice.choices(WORDS, k=words))
        body = {"model": "default", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self.tasks.append(asyncio.create_task(self.read(body)))
        return self.tasks[-1]

    async def read(self, body: dict) -> None:
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            chunks = 0
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line.removeprefix("data: ")), line
                    self.begun += chunks == 0
                    chunks += 1
            self.done += 1

    def still_asks(self) -> None:
        """Fails with what a stream failed with."""
        for task in self.tasks:
            if task.done():
                task.result()

    async def hang_up(self) -> None:
        for task in self.tasks:
            task.cancel()
        # Some were cut off, and that is how they end.
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.http.aclose()


async def until(condition, *crowds: Crowd) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        for crowd in crowds:
            crowd.still_asks()
        assert time.monotonic() < deadline, [(crowd.begun, crowd.done) for crowd in crowds]
        await asyncio.sleep(0.02)
    for crowd in crowds:
        crowd.still_asks()


def in_engine(own: harness.Server) -> float:
    metrics = own.metrics()
    return metrics.total("vllm:num_requests_running") + metrics.total("vllm:num_requests_waiting")


@pytest.mark.parametrize(("weight", "share"), [("1", 1 / 2), ("3", 3 / 4)])
def test_device_time_follows_the_weights_while_both_wait(tmp_path, say, weight, share):
    weights = f"[scheduling.weights]\nsearch = {weight}\nfirst = 1000\n"
    own = start(tmp_path, weights, "--drain-timeout", "0")
    keys = {team: key(own, team) for team in ("first", "search", "nightly")}

    async def both() -> None:
        # Who weighs so much keeps every place until both wait with all that they ask for: so they begin at once,
        # however long a crowd takes to come.
        first = Crowd(own, keys["first"]["key"], 3)
        for _ in range(8 * LANES):
            first.ask(4, 500)
        await until(lambda: first.begun >= LANES, first)
        # They ask for different things, and each for more than it can have before both are cut off.
        search = Crowd(own, keys["search"]["key"], 1)
        nightly = Crowd(own, keys["nightly"]["key"], 2)
        asked = len(first.tasks)
        for number in range(180):
            search.ask(4 + number % 5, 3 + number % 3)
            nightly.ask(9 + number % 6, 1 + number % 3)
        asked += len(search.tasks) + len(nightly.tasks)
        await until(lambda: in_engine(own) >= asked - first.done, first, search, nightly)
        assert search.begun == nightly.begun == 0, "they came while every place was taken"
        await first.hang_up()
        await until(lambda: search.done + nightly.done >= 160, search, nightly)
        # All of it ends in one step, where hanging up takes a while in which only one of them is left.
        assert await asyncio.to_thread(own.stop) == 0
        await asyncio.gather(search.hang_up(), nightly.hang_up())

    asyncio.run(both())
    own.start()
    charged = {}
    for team in ("search", "nightly"):
        receipts = receipts_of(own, keys[team]["key_id"])
        assert {receipt["tenant"] for receipt in receipts} == {team}
        assert sum(receipt["steps"] == 0 for receipt in receipts) > 10, "it waited to the end"
        charged[team] = sum(int(receipt["device_ns"]["total"]) for receipt in receipts)
    got = charged["search"] / sum(charged.values())
    say(f"search has {weight} times the weight of nightly: {got:.4f} of the device time, {share:.4f} is its share")
    assert abs(got / share - 1) < 0.05 and abs((1 - got) / (1 - share) - 1) < 0.05, charged
    assert own.stop() == 0
    own.audit()


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_a_flood_of_one_team_does_not_come_before_another_teams_request(tmp_path, say, policy):
    own = start(tmp_path, "", "--scheduling", policy)
    flooding, small = key(own, "flooding"), key(own, "small")

    async def flooded() -> tuple[int, int]:
        flood, other = Crowd(own, flooding["key"], 3), Crowd(own, small["key"], 4)
        for _ in range(80):
            flood.ask(12, 24)
        await until(lambda: own.metrics().total("vllm:num_requests_waiting") + flood.begun >= 80 - LANES, flood)
        queued, begun = 80 - flood.begun, flood.begun
        other.ask(12, 4)
        await until(lambda: other.begun == 1, flood, other)
        before = flood.begun - begun
        await asyncio.gather(flood.hang_up(), other.hang_up())
        return queued, before

    queued, before = asyncio.run(flooded())
    say(f"{policy}: {queued} requests were queued before it, {before} of them began before its first token")
    assert queued > 60
    if policy == "fair":
        assert before <= 2 * LANES, "what was running or in a step already"
    else:
        assert before >= queued - LANES, "the flood is one"
    own.wait_idle()
    assert own.stop() == 0
    own.audit()
