"""Keys as real clients meet them: the openai and litellm packages, curl-like calls in LiteLLM's field names, the
command line beside a running server, and kill -9 in the middle of changes.
"""

import json
import os
import random
import subprocess
import threading
import time

import harness
import httpx
import openai
import pytest

# Before litellm is imported: its price list would come over the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

ADMIN = "sk-admin-key-of-the-client-tests"
HELLO = [{"role": "user", "content": "Say hello."}]
KILL_ROUNDS = int(os.environ.get("OBOL_KILL_ROUNDS", "3"))
SMALL = ("--max-model-len", "512", "--kv-memory", "64MiB")


def keys(own: harness.Server, *arguments: str):
    """`obol keys` over a server's data directory; what it printed as JSON."""
    result = harness.run("keys", *arguments, "--json", "--data-dir", str(own.data_dir))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def admin(own: harness.Server) -> httpx.Client:
    return httpx.Client(base_url=own.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=60)


def order(http: httpx.Client, path: str, **body) -> dict:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def client(own: harness.Server, secret: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{own.url}/v1", api_key=secret, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> harness.Server:
    """A server with an admin key, for the tests of this file."""
    data_dir = tmp_path_factory.mktemp("guarded") / "data"
    own = harness.Server(data_dir, *SMALL, OBOL_ADMIN_KEY=ADMIN).start()
    yield own
    assert own.alive(), own.log()
    assert own.stop() == 0, own.log()
    own.audit()
    for text in (own.log_path.read_text(errors="replace"), json.dumps(keys(own, "log"))):
        assert ADMIN not in text and "sk-obol-" not in text, "a secret in the log or in the trail"


def test_the_openai_package_gets_its_own_exceptions(guarded):
    with admin(guarded) as http:
        good = order(http, "/key/generate", models=["default"], max_tokens=20)
        other = order(http, "/key/generate", models=["gpt-4o"])
    answer = client(guarded, good["key"]).chat.completions.create(model="default", messages=HELLO, max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    assert answer.usage.obol["key_id"] == good["key_id"]
    for secret in ("any", "sk-obol-" + "x" * 43, ADMIN[:-1]):
        with pytest.raises(openai.AuthenticationError) as caught:
            client(guarded, secret).chat.completions.create(model="default", messages=HELLO)
        assert caught.value.code == "invalid_api_key" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client(guarded, other["key"]).chat.completions.create(model="default", messages=HELLO)
    assert caught.value.code == "model_not_allowed" and caught.value.param == "model"
    assert [model.id for model in client(guarded, other["key"]).models.list()] == []
    with pytest.raises(openai.BadRequestError) as caught:
        client(guarded, good["key"]).chat.completions.create(model="default", messages=HELLO, max_tokens=21)
    assert caught.value.param == "max_tokens" and "21" in caught.value.message and "20" in caught.value.message
    stream = client(guarded, good["key"]).chat.completions.create(
        model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    assert list(stream)[-1].usage.completion_tokens <= 20, "without max_tokens the key's is the ceiling"


def test_a_request_is_booked_under_its_key_and_its_tags(guarded):
    with admin(guarded) as http:
        one = order(http, "/key/generate", team_id="search", tags={"environment": "prod"})
        two = order(http, "/key/generate")
    ours = client(guarded, one["key"]).with_options(
        default_headers={"x-obol-team": "mine", "x-obol-feature": "chat", "x-obol-task": "run-7"}
    )
    raw = ours.chat.completions.with_raw_response.create(
        model="default", messages=HELLO, max_tokens=4, metadata={"feature": "other", "cost_center": "c7"}
    )
    path = f"/v1/requests/{raw.headers['x-request-id']}"
    receipt = client(guarded, one["key"]).get(path.removeprefix("/v1"), cast_to=httpx.Response).json()
    assert receipt == raw.parse().usage.obol
    assert receipt["tenant"] == "search" and receipt["key_id"] == one["key_id"]
    assert receipt["tags"] == {
        "team": "search",
        "environment": "prod",
        "feature": "chat",
        "task": "run-7",
        "cost_center": "c7",
    }
    with pytest.raises(openai.NotFoundError):
        client(guarded, two["key"]).get(path.removeprefix("/v1"), cast_to=httpx.Response)
    with admin(guarded) as http:
        assert http.get(path).json() == receipt
        info = http.get("/key/info", params={"key": one["key"]}).json()["info"]
        assert info["obol"]["spend"] == receipt["cost"]["total"] and info["spend"] == float(info["obol"]["spend"])
    assert keys(guarded, "show", one["token"])["spend"] == {"USD": receipt["cost"]["total"]}


def test_the_litellm_package_calls_the_server(guarded):
    import litellm

    with admin(guarded) as http:
        made = order(http, "/key/generate", key_alias="litellm", team_id="gateway", metadata={"owner": "ann"})
    request = {"model": "openai/default", "api_base": f"{guarded.url}/v1", "messages": HELLO, "max_tokens": 8}
    answer = litellm.completion(**request, api_key=made["key"])
    assert answer.choices[0].message.content and 0 < answer.usage.completion_tokens <= 8
    parts = list(litellm.completion(**request, api_key=made["key"], stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**request, api_key="sk-obol-unknown", num_retries=0)
    with admin(guarded) as http:
        receipts = http.get("/v1/requests", params={"key_id": made["key_id"]}).json()["data"]
        spend = http.get("/key/info", params={"key": made["token_id"]}).json()["info"]["obol"]["spend"]
    assert [receipt["tenant"] for receipt in receipts] == ["gateway"] * 2
    picos = sum(int(receipt["cost"]["total"].replace(".", "")) for receipt in receipts)
    assert int(spend.replace(".", "")) == picos, "the sum of its receipts, to the last digit"


def test_litellms_admin_calls(guarded):
    """Bodies and answers as LiteLLM's proxy has them."""
    with admin(guarded) as http:
        body = {"models": ["default"], "duration": "20m", "metadata": {"team": "core-infra"}, "max_budget": 10}
        made = order(http, "/key/generate", **body, budget_duration="30d", key_alias="core", rpm_limit=60)
        assert made["key"].startswith("sk-") and made["key_name"] == f"sk-...{made['key'][-4:]}"
        assert made["max_budget"] == 10 and made["expires"] and made["spend"] == 0
        info = http.get("/key/info", params={"key": made["key"]}).json()
        assert info["key"] == made["key"] and info["info"]["key_alias"] == "core"
        assert "key" not in info["info"], "the secret is shown once"
        changed = order(http, "/key/update", key=made["key"], max_budget=20, metadata={"a": 1}, duration=None)
        assert (changed["max_budget"], changed["metadata"], changed["expires"]) == (20, {"a": 1}, None)
        assert changed["models"] == ["default"] and changed["rpm_limit"] == 60, "what is not named stays"
        assert order(http, "/key/block", key=made["key"])["blocked"] is True
        with pytest.raises(openai.AuthenticationError, match="blocked"):
            client(guarded, made["key"]).models.list()
        assert order(http, "/key/unblock", key=made["key"])["blocked"] is False
        renewed = order(http, f"/key/{made['token_id']}/regenerate")
        assert renewed["key"] != made["key"] and renewed["key_id"] == made["key_id"]
        with pytest.raises(openai.AuthenticationError):
            client(guarded, made["key"]).models.list()
        client(guarded, renewed["key"]).models.list()
        listed = http.get("/key/list", params={"return_full_object": True, "key_alias": "core"}).json()
        assert [key["token"] for key in listed["keys"]] == [renewed["token_id"]]
        assert listed["total_count"] == listed["total_pages"] == listed["current_page"] == 1
        assert order(http, "/key/delete", keys=[renewed["key"]]) == {"deleted_keys": [renewed["key"]]}
        assert http.get("/key/list", params={"key_alias": "core"}).json()["keys"] == []
        trail = http.get("/v1/organization/audit_logs", params={"target": made["key_id"]}).json()["data"]
    actions = [row["type"].removeprefix("api_key.") for row in trail]
    assert actions == ["deleted", "rotated", "unblocked", "blocked", "updated", "created"]


def test_the_command_line_changes_keys_beside_a_running_server(guarded):
    made = keys(guarded, "create", "--alias", "shell", "--team", "ops")
    client(guarded, made["key"]).models.list()
    keys(guarded, "update", "shell", "--block")
    time.sleep(0.11)
    with pytest.raises(openai.AuthenticationError, match="blocked"):
        client(guarded, made["key"]).models.list()
    renewed = keys(guarded, "rotate", "shell", "--grace", "1h")
    keys(guarded, "update", "shell", "--unblock")
    time.sleep(0.11)
    for secret in (made["key"], renewed["key"]):
        client(guarded, secret).models.list()
    assert keys(guarded, "revoke", "shell") == {"revoked": [made["key_id"]]}
    time.sleep(0.11)
    with pytest.raises(openai.AuthenticationError):
        client(guarded, renewed["key"]).models.list()
    with admin(guarded) as http:
        rows = http.get("/v1/organization/audit_logs", params={"target": made["key_id"]}).json()["data"]
    assert {row["actor"]["id"] for row in rows} == {"cli"}


def test_other_machines_need_keys(tmp_path):
    flags = ("serve", "--model", harness.model(), "--data-dir", str(tmp_path / "data"))
    address = f"0.0.0.0:{harness.free_port()}"
    refused = harness.run(*flags, "--listen", address)
    assert refused.returncode == 2 and "--admin-key-file" in refused.stderr, refused.stderr
    weak = harness.run(*flags, "--listen", address, OBOL_ADMIN_KEY="sk-1234")
    assert weak.returncode == 2 and "OBOL_ADMIN_KEY" in weak.stderr and "1234" not in weak.stderr, weak.stderr
    bytes_ = harness.run(*flags, "--listen", address, OBOL_ADMIN_KEY=os.fsdecode(b"sk-\xff" * 8))
    assert bytes_.returncode == 2 and "OBOL_ADMIN_KEY: it is not UTF-8" in bytes_.stderr, bytes_.stderr
    missing = harness.run(*flags, "--admin-key-file", str(tmp_path / "none"))
    assert missing.returncode == 2 and "--admin-key-file" in missing.stderr, missing.stderr


def test_metrics_and_tags_as_configured(tmp_path):
    admin_key, scraper = tmp_path / "admin.key", tmp_path / "scraper.key"
    admin_key.write_text(ADMIN + "\n")
    scraper.write_text("sk-scraper-of-the-tests\n")
    files = ("--admin-key-file", str(admin_key), "--metrics-key-file", str(scraper))
    own = harness.Server(tmp_path / "data", *SMALL, *files)
    own.flags += ("--require-tags", "team")
    own.start()
    try:
        assert own.get("/metrics").status == 401
        for key in (ADMIN, "sk-scraper-of-the-tests"):
            assert own.request("GET", "/metrics", headers={"authorization": f"Bearer {key}"}).status == 200
        answer = own.post(
            "/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 1}, {"x-api-key": ADMIN}
        )
        assert answer.status == 400 and answer.error()["code"] == "missing_tag"
        assert answer.error()["param"] == "team"
    finally:
        assert own.stop() == 0, own.log()


def change_until_dead(own: harness.Server, worker: int, acknowledged: list, started: threading.Event) -> None:
    """Makes, blocks, rotates and deletes keys, and notes each state that was acknowledged."""
    number = 0
    while True:
        number += 1
        try:
            with admin(own) as http:
                made = order(http, "/key/generate", key_alias=f"{own.port}-{worker}-{number}")
                acknowledged.append(("made", made["key_id"], made["key"]))
                started.set()
                match number % 3:
                    case 0:
                        order(http, "/key/block", key=made["key"])
                        acknowledged.append(("blocked", made["key_id"], made["key"]))
                    case 1:
                        made = order(http, "/key/regenerate", key=made["key"])
                        acknowledged.append(("rotated", made["key_id"], made["key"]))
                    case _:
                        order(http, "/key/delete", keys=[made["key_id"]])
                        acknowledged.append(("deleted", made["key_id"], made["key"]))
        except httpx.TransportError:
            return


def shell_until_dead(own: harness.Server, acknowledged: list, stop: threading.Event) -> None:
    """Makes keys on the command line beside the server, each killed at some moment."""
    draw = random.Random(own.port)
    while not stop.is_set():
        command = [harness.binary(), "keys", "create", "--json", "--data-dir", str(own.data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=harness.clean_environment(), cwd=own.data_dir)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        said = process.communicate()[0]
        if said.endswith(b"\n"):
            made = json.loads(said)
            acknowledged.append(("made", made["key_id"], made["key"]))


def test_kill_9_loses_no_acknowledged_change(tmp_path, say):
    own = harness.Server(tmp_path / "data", *SMALL, OBOL_ADMIN_KEY=ADMIN)
    acknowledged: list[tuple[str, str, str]] = []
    draw = random.Random(23)
    for _ in range(KILL_ROUNDS):
        own.start()
        started, stop = threading.Event(), threading.Event()
        workers = [
            threading.Thread(target=change_until_dead, args=(own, worker, acknowledged, started))
            for worker in range(3)
        ]
        workers.append(threading.Thread(target=shell_until_dead, args=(own, acknowledged, stop)))
        for worker in workers:
            worker.start()
        assert started.wait(60), own.log()
        time.sleep(draw.uniform(0.1, 1.0))
        own.kill()
        stop.set()
        for worker in workers:
            worker.join(60)
    own.start()
    last = {key_id: (state, secret) for state, key_id, secret in acknowledged}
    rows = {key["key_id"]: key for key in keys(own, "list", "--all")}
    with admin(own) as http:
        for key_id, (state, secret) in last.items():
            key = rows[key_id]
            # A change under way when the server died may have been made, and was not acknowledged.
            if state == "blocked":
                assert key["blocked"], key_id
            if state == "deleted":
                assert key["deleted_at"], key_id
            if state == "rotated":
                assert key["key_name"] == f"sk-...{secret[-4:]}", key_id
            status = http.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code
            changed = key["blocked"] or key["deleted_at"] or key["key_name"] != f"sk-...{secret[-4:]}"
            assert status == (401 if changed else 200), (key_id, state)
    trail = keys(own, "log", "--limit", "100000")
    created = [row["target"] for row in trail if row["type"] == "api_key.created"]
    assert sorted(created) == sorted(rows), "each key is in the trail, once"
    for key_id, key in rows.items():
        after = next(row["after"] for row in trail if row["target"] == key_id)
        assert after == {name: key[name] for name in after}, "the trail ends where the key stands"
    assert own.stop() == 0
    own.audit()
    say(f"kill -9: {KILL_ROUNDS} rounds, {len(acknowledged)} acknowledged changes of {len(last)} keys, none lost")
