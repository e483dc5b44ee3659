"""Files and batches through the openai package, with the real model: results, errors, cancelling, expiry, whose they
are, and kill -9 in the middle, after which each line has one result and was charged once.
"""

import contextlib
import json
import os
import random
import sqlite3
import time

import harness
import openai
import pytest
from test_budgets import picos, receipts_of
from test_keys import ADMIN, SMALL, admin, client, order

KILLED_LINES = int(os.environ.get("OBOL_BATCH_LINES", "60"))
KILLS = int(os.environ.get("OBOL_BATCH_KILLS", "2"))
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> harness.Server:
    data_dir = tmp_path_factory.mktemp("batches") / "data"
    config = data_dir.with_name("obol.toml")
    config.write_text("[batches]\nmax_file = '1MiB'\nmax_lines = 2000\nmax_running = 8\n[rates.tiers]\nbatch = '0.5'\n")
    # One place in the queue, of which lines of batches take none: a live client is never told that it is full.
    flags = (*SMALL, "--queue-depth", "1", "--max-sequences", "4", "--config", str(config))
    own = harness.Server(data_dir, *flags, OBOL_ADMIN_KEY=ADMIN).start()
    yield own
    assert own.alive(), own.log()
    own.wait_idle()
    assert own.stop() == 0, own.log()
    own.audit()


def key(own: harness.Server, **settings) -> dict:
    with admin(own) as http:
        return order(http, "/key/generate", **settings)


def line(custom_id: str, url: str = CHAT, **body) -> dict:
    asked = {"messages": [{"role": "user", "content": f"A word about {custom_id}."}]}
    if url == COMPLETIONS:
        asked = {"prompt": f"A word about {custom_id}:"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "default", **asked, **body}}


def jsonl(lines: list) -> bytes:
    return "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines).encode()


def submit(http: openai.OpenAI, lines: list, endpoint: str = CHAT, window: str = "24h", **more):
    file = http.files.create(file=("lines.jsonl", jsonl(lines)), purpose="batch")
    return http.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window=window, **more
    )


def has_ended(batch) -> bool:
    return batch.status in ("completed", "failed", "expired", "cancelled")


def until(http: openai.OpenAI, batch_id: str, done=has_ended, seconds=240):
    deadline = time.monotonic() + seconds
    while True:
        batch = http.batches.retrieve(batch_id)
        if done(batch):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)


def records(http: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    if file_id is None:
        return {}
    lines = [json.loads(text) for text in http.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines), "an id has two records"
    assert len({each["id"] for each in lines}) == len(lines)
    return found


def charged(own: harness.Server, key_id: str) -> dict[str, list[dict]]:
    """What each line was charged for: its receipts that cost something."""
    found: dict[str, list[dict]] = {}
    for receipt in receipts_of(own, key_id):
        if receipt["status"] != "error" and picos(receipt["cost"]["total"]) > 0:
            found.setdefault(receipt["client_request_id"], []).append(receipt)
    return found


def test_results_have_their_ids_and_cost_what_their_receipts_say(guarded):
    made = key(guarded, team_id="nightly")
    http = client(guarded, made["key"])
    lines = [line(f"line-{n}", max_tokens=4 + n % 5, temperature=0) for n in range(12)]
    batch = submit(http, lines, metadata={"job": "night"})
    assert batch.object == "batch" and batch.completion_window == "24h" and batch.endpoint == CHAT
    assert batch.expires_at - batch.created_at == 24 * 3600
    done = until(http, batch.id)
    assert done.status == "completed" and done.errors is None and done.error_file_id is None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (12, 12, 0)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.metadata == {"job": "night"}
    results = records(http, done.output_file_id)
    assert set(results) == {f"line-{n}" for n in range(12)}
    receipts = charged(guarded, made["key_id"])
    assert len(receipts) == 12 and all(len(of_line) == 1 for of_line in receipts.values())
    by_id = {of_line[0]["request_id"]: of_line[0] for of_line in receipts.values()}
    total = tokens = 0
    for custom_id, result in results.items():
        assert result["error"] is None and result["response"]["status_code"] == 200
        body = result["response"]["body"]
        assert body["object"] == "chat.completion" and body["choices"][0]["message"]["content"]
        receipt = by_id[result["response"]["request_id"]]
        assert receipt["tenant"] == "nightly" and body["usage"]["obol"] == receipt, custom_id
        assert receipt["service_tier"] == "batch"
        cost = {name: picos(receipt["cost"][name]) for name in ("total", "time", "memory", "discount")}
        assert cost["total"] == cost["time"] + cost["memory"] - cost["discount"] and cost["discount"] > 0
        assert receipt["client_request_id"].startswith(f"{batch.id}:")
        total += picos(receipt["cost"]["total"])
        tokens += body["usage"]["completion_tokens"]
    assert done.usage.output_tokens == tokens
    assert picos(done.usage.obol["cost"]["total"]) == total
    # The same question asked directly has the same answer.
    alone = http.chat.completions.create(**lines[3]["body"])
    assert results["line-3"]["response"]["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
    # Asking again is free.
    for _ in range(3):
        http.batches.retrieve(batch.id)
        http.files.content(done.output_file_id)
    assert len(receipts_of(guarded, made["key_id"])) == 13


def test_a_line_that_is_refused_is_an_error_of_its_own(guarded):
    made = key(guarded)
    http = client(guarded, made["key"])
    lines = [
        line("good", COMPLETIONS, max_tokens=3),
        line("hot", COMPLETIONS, max_tokens=3, temperature=9),
        line("long", COMPLETIONS, max_tokens=3) | {},
    ]
    lines[2]["body"]["prompt"] = "word " * 2000
    done = until(http, submit(http, lines, COMPLETIONS).id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 1, 2)
    assert set(records(http, done.output_file_id)) == {"good"}
    errors = records(http, done.error_file_id)
    assert set(errors) == {"hot", "long"}
    assert {each["response"]["status_code"] for each in errors.values()} == {400}
    assert errors["hot"]["response"]["body"]["error"]["param"] == "temperature"
    assert errors["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert len(charged(guarded, made["key_id"])) == 1


def test_vectors_come_in_batches_too(guarded):
    made = key(guarded)
    http = client(guarded, made["key"])
    path = "/v1/embeddings"
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": path, "body": {"model": "default", "input": f"Word {n}."}}
        for n in range(4)
    ]
    done = until(http, submit(http, lines, path).id)
    assert done.status == "completed" and done.usage.output_tokens == 0 < done.usage.input_tokens
    results = records(http, done.output_file_id)
    alone = http.embeddings.create(**lines[2]["body"], encoding_format="float")
    assert results["2"]["response"]["body"]["data"][0]["embedding"] == alone.data[0].embedding
    paid = [line for line in charged(guarded, made["key_id"]) if line is not None]
    assert len(paid) == 4


def test_an_input_that_is_not_good_fails_with_its_lines(guarded):
    http = client(guarded, key(guarded)["key"])
    lines = [
        line("a"), "{no json", line("a"), line("b", COMPLETIONS), line("c") | {"method": "GET"},
        line("d", model="gpt-4o"), {"method": "POST", "url": CHAT, "body": {}}, line("e", stream=True),
    ]  # fmt: skip
    failed = until(http, submit(http, lines).id)
    assert failed.status == "failed" and failed.failed_at and failed.output_file_id is None
    told = [(error.line, error.code) for error in failed.errors.data]
    assert told == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url"), (5, "invalid_method"),
        (6, "model_not_found"), (7, "missing_required_parameter"), (8, "invalid_parameter"),
    ]  # fmt: skip
    assert all(error.message for error in failed.errors.data)
    assert until(http, submit(http, []).id).errors.data[0].code == "empty_file"
    many = [line(f"{n}") for n in range(2001)]
    crowd = until(http, submit(http, many).id)
    assert [(error.line, error.code) for error in crowd.errors.data] == [(2001, "too_many_lines")]


def test_what_cannot_be_is_refused_by_name(guarded):
    http = client(guarded, key(guarded)["key"])
    file = http.files.create(file=("x.jsonl", jsonl([line("a")])), purpose="batch")

    def refused(error: type[openai.APIStatusError], param: str | None, call) -> openai.APIStatusError:
        with pytest.raises(error) as caught:
            call()
        assert caught.value.param == param, caught.value.body
        return caught.value

    bad = openai.BadRequestError
    refused(bad, "purpose", lambda: http.files.create(file=("x", b"{}"), purpose="fine-tune"))
    refused(openai.APIStatusError, "file", lambda: http.files.create(file=("x", b"x" * (1 << 20 | 1)), purpose="batch"))
    refused(bad, "endpoint", lambda: http.batches.create(
        input_file_id=file.id, endpoint="/v1/moderations", completion_window="24h"))
    refused(bad, "completion_window", lambda: http.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="8d"))
    refused(openai.NotFoundError, "input_file_id", lambda: http.batches.create(
        input_file_id="file-none", endpoint=CHAT, completion_window="24h"))
    refused(openai.NotFoundError, "id", lambda: http.files.retrieve("file-none"))
    refused(openai.NotFoundError, "id", lambda: http.files.delete("../control.db"))
    refused(openai.NotFoundError, "id", lambda: http.batches.retrieve("batch_none"))
    assert guarded.post("/v1/files", b"{}", {"authorization": f"Bearer {ADMIN}"}).status == 400


def test_files_and_batches_are_their_makers(guarded):
    mine, other, all_seeing = (client(guarded, secret) for secret in (key(guarded)["key"], key(guarded)["key"], ADMIN))
    batch = until(mine, submit(mine, [line("x", max_tokens=2)]).id)
    file_ids = [batch.input_file_id, batch.output_file_id]
    for file_id in file_ids:
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
        assert mine.files.retrieve(file_id).id == all_seeing.files.retrieve(file_id).id == file_id
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert list(other.files.list()) == [] and list(other.batches.list()) == []
    assert [file.id for file in mine.files.list(order="asc")] == file_ids
    assert [file.id for file in mine.files.list(purpose="batch_output")] == file_ids[1:]
    assert [each.id for each in mine.batches.list()] == [batch.id]
    assert batch.id in [each.id for each in all_seeing.batches.list(limit=1)], "page by page"
    content = mine.files.content(batch.input_file_id).content
    assert content == jsonl([line("x", max_tokens=2)])
    assert mine.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        mine.files.content(batch.input_file_id)
    with pytest.raises(openai.ConflictError):
        mine.batches.cancel(batch.id)


def test_a_cancelled_batch_delivers_what_was_done_and_charges_no_more(guarded):
    made = key(guarded)
    http = client(guarded, made["key"])
    lines = [line(f"{n}", max_tokens=12, temperature=0) | {} for n in range(200)]
    for each in lines:
        each["body"]["ignore_eos"] = True
    batch = submit(http, lines)
    with pytest.raises(openai.ConflictError):
        http.files.delete(batch.input_file_id)
    until(http, batch.id, done=lambda batch: batch.request_counts.completed >= 5)
    cancelling = http.batches.cancel(batch.id)
    assert cancelling.status == "cancelling" and cancelling.cancelling_at
    done = until(http, batch.id)
    assert done.status == "cancelled" and done.cancelled_at and done.completed_at is None
    results = records(http, done.output_file_id)
    assert 5 <= len(results) == done.request_counts.completed < 200
    receipts = charged(guarded, made["key_id"])
    assert len(receipts) == len(results) and all(len(of_line) == 1 for of_line in receipts.values())
    assert http.files.delete(batch.input_file_id).deleted


def test_when_its_window_ends_what_was_done_is_delivered(guarded):
    made = key(guarded)
    http = client(guarded, made["key"])
    lines = [line(f"{n}", max_tokens=harness.long(100), ignore_eos=True) for n in range(400)]
    batch = submit(http, lines, window="4s")
    done = until(http, batch.id)
    assert done.status == "expired" and done.expired_at >= done.expires_at
    results, errors = records(http, done.output_file_id), records(http, done.error_file_id)
    assert len(results) == done.request_counts.completed
    assert not set(results) & set(errors) and len(results) + len(errors) == 400
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
    assert all(each["response"] is None for each in errors.values())
    guarded.wait_idle()
    receipts = charged(guarded, made["key_id"])
    assert len(receipts) == len(results), "who gets no result pays nothing"


def test_a_key_that_may_not_ask_any_more_fails_its_lines(guarded):
    made = key(guarded, max_budget="0.0000000001")
    http = client(guarded, made["key"])
    done = until(http, submit(http, [line(f"{n}", max_tokens=8, ignore_eos=True) for n in range(6)]).id)
    errors = records(http, done.error_file_id)
    assert errors and {each["response"]["body"]["error"]["code"] for each in errors.values()} == {"budget_exceeded"}
    blocked = key(guarded)
    http = client(guarded, blocked["key"])
    batch = submit(http, [line(f"{n}", max_tokens=harness.long(60), ignore_eos=True) for n in range(60)])
    until(http, batch.id, done=lambda batch: batch.request_counts.completed >= 1)
    with admin(guarded) as root:
        order(root, "/key/block", key=blocked["key"])
    done = until(client(guarded, ADMIN), batch.id)
    assert done.request_counts.completed + done.request_counts.failed == 60
    errors = records(client(guarded, ADMIN), done.error_file_id)
    assert errors and {each["response"]["status_code"] for each in errors.values()} == {401}


def test_a_live_client_beside_a_batch_is_answered(guarded):
    batched = client(guarded, key(guarded)["key"])
    live = client(guarded, key(guarded)["key"])
    lines = [line(f"{n}", max_tokens=20, ignore_eos=True) for n in range(40)]
    batch = submit(batched, lines)
    until(batched, batch.id, done=lambda batch: batch.status == "in_progress")
    for _ in range(5):
        answer = live.completions.create(model="default", prompt="The sea is", max_tokens=4)
        assert answer.usage.completion_tokens > 0
    assert until(batched, batch.id).request_counts.completed == 40


def lose(own: harness.Server, batch_id: str, lines: int) -> int:
    """Forgets the results of some lines that were charged: as if the server had been killed between the two."""
    database = sqlite3.connect(own.data_dir / "batches.db")
    with contextlib.closing(database), database:
        found = database.execute(
            "SELECT line, record FROM results WHERE batch = ? ORDER BY line LIMIT ?", (batch_id, lines)
        ).fetchall()
        for number, record in found:
            database.execute("DELETE FROM results WHERE batch = ? AND line = ?", (batch_id, number))
            usage = json.loads(record)["response"]["body"]["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            database.execute(
                "UPDATE batches SET completed = completed - 1, prompt_tokens = prompt_tokens - ?,"
                " cached_tokens = cached_tokens - ?, completion_tokens = completion_tokens - ?,"
                " cost_picos = cost_picos - ? WHERE id = ?",
                (usage["prompt_tokens"], cached, usage["completion_tokens"],
                 picos(usage["obol"]["cost"]["total"]), batch_id),
            )  # fmt: skip
    return len(found)


def test_killed_in_the_middle_each_line_has_one_result_and_is_charged_once(start, say):
    own = start(*SMALL, OBOL_ADMIN_KEY=ADMIN)
    made = key(own)
    dice = random.Random(5)
    # Half of them draw: their seeds are their own, and the same each time.
    lines = [
        line(f"line-{n}", COMPLETIONS, max_tokens=dice.randint(4, 24), temperature=n % 2, ignore_eos=True)
        for n in range(KILLED_LINES)
    ]
    http = client(own, made["key"])
    batch = submit(http, lines, COMPLETIONS)
    lost = 0
    for kill in range(KILLS):
        share = (kill + 1) * KILLED_LINES // (KILLS + 2)
        until(client(own, made["key"]), batch.id, done=lambda batch, share=share: batch.request_counts.completed > share)
        own.kill()
        lost += lose(own, batch.id, 3)
        own.start()
        own.audit()
    http = client(own, made["key"])
    done = until(http, batch.id, seconds=2400)
    assert done.status == "completed", done
    assert (done.request_counts.total, done.request_counts.completed) == (KILLED_LINES, KILLED_LINES)
    results = records(http, done.output_file_id)
    assert set(results) == {each["custom_id"] for each in lines}
    receipts = receipts_of(own, made["key_id"])
    paid = charged(own, made["key_id"])
    assert len(paid) == KILLED_LINES and all(len(of_line) == 1 for of_line in paid.values())
    by_id = {of_line[0]["request_id"]: of_line[0] for of_line in paid.values()}
    total = 0
    for custom_id, result in results.items():
        receipt = by_id.pop(result["response"]["request_id"])
        assert result["response"]["body"]["usage"]["obol"] == receipt, custom_id
        assert result["response"]["body"]["usage"]["completion_tokens"] == receipt["tokens"]["completion"]
        total += picos(receipt["cost"]["total"])
    assert not by_id
    assert picos(done.usage.obol["cost"]["total"]) == total
    with admin(own) as root:
        spent = root.get("/key/info", params={"key": made["key"]}).json()["info"]["obol"]["spend"]
    assert picos(spent) == total, "what the key has spent"
    house = [each for each in receipts if picos(each["cost"]["cap_overrun"]) > 0]
    assert lost >= 3 * KILLS and len(house) >= lost, "lost answers are computed again for the house"
    # Whatever became of the server, an answer is what the same request gives by itself.
    seeded = [each for each in house if each["status"] == "length"]
    assert {each["seed"] for each in seeded} <= {each["seed"] for of_line in paid.values() for each in of_line}
    own.audit()
    assert own.stop() == 0
    own.audit()
    say(f"{KILLED_LINES} lines, {KILLS} times kill -9, {lost} results lost on purpose: each charged once")


def test_a_server_that_stops_goes_on_with_its_batches(start):
    own = start(*SMALL, "--drain-timeout", "0", OBOL_ADMIN_KEY=ADMIN)
    made = key(own)
    http = client(own, made["key"])
    lines = [line(f"{n}", COMPLETIONS, max_tokens=harness.long(60), ignore_eos=True) for n in range(30)]
    batch = submit(http, lines, COMPLETIONS)
    until(http, batch.id, done=lambda batch: batch.request_counts.completed >= 1)
    assert own.stop() == 0
    own.audit()
    own.start()
    http = client(own, made["key"])
    done = until(http, batch.id)
    assert done.status == "completed" and len(records(http, done.output_file_id)) == 30
    paid = charged(own, made["key_id"])
    assert len(paid) == 30 and all(len(of_line) == 1 for of_line in paid.values())
    assert own.stop() == 0
    own.audit()
