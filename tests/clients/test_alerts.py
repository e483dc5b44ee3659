"""Alerts as whoever is told of them meets them: a webhook that is down, then up; kill -9 in between; one of each."""

import http.server
import json
import threading
import time

import harness
import httpx
import pytest
from test_keys import ADMIN, HELLO, admin, order

CONFIG = """
[[budgets]]
name = "the cap"
scope = "team"
cap = "0.000006"
window = "month"
alerts = [50, 100]

[alerts]
request_cost = "0.0000001"
[[alerts.webhooks]]
url = "{url}"
"""


class Receiver:
    """A webhook: keeps what it was sent, and answers with `status`."""

    def __init__(self):
        self.status, self.events, self.refused = 503, [], 0
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                event = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if receiver.status == 200:
                    receiver.events.append(event)
                else:
                    receiver.refused += 1
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/a-secret-path"


@pytest.fixture
def receiver():
    own = Receiver()
    yield own
    own.server.shutdown()


def wait_until(what: str, condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def test_a_webhook_that_was_down_hears_of_each_alert_once(tmp_path, receiver):
    file = tmp_path / "obol.toml"
    file.write_text(CONFIG.format(url=receiver.url))
    flags = ("--max-model-len", "512", "--kv-memory", "64MiB", "--config", str(file))
    own = harness.Server(tmp_path / "data", *flags, OBOL_ADMIN_KEY=ADMIN).start()
    with admin(own) as http:
        key = order(http, "/key/generate", team_id="red")
    body = {"model": "default", "messages": HELLO, "max_tokens": 40, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key['key']}"}

    def ask() -> httpx.Response:
        return httpx.post(f"{own.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    answered = 0
    while (answer := ask()).status_code == 200:
        answered += 1
        assert answered < 200, "the budget is never spent"
    assert answer.json()["error"]["code"] == "budget_exceeded"
    wait_until("a try while the webhook is down", lambda: receiver.refused > 0)
    own.kill()
    receiver.status = 200
    own.start()
    # A limit that was reached just before may not have been written down; it is when it is met again.
    assert ask().json()["error"]["code"] == "budget_exceeded"
    kinds = {"budget_crossed", "threshold_crossed", "request_cost_exceeded"}
    wait_until("both limits and a dear request", lambda: kinds <= {event["event"] for event in receiver.events})
    metrics = own.metrics()
    wait_until("nothing to be left", lambda: own.metrics().total("obol_alerts_unsent") == 0)
    assert metrics.total("obol_budget_cap") > 0
    events = receiver.events
    assert len({event["id"] for event in events}) == len(events), "each once"
    crossed = [event for event in events if event["obol"]["kind"] == "budget"]
    assert sorted(event["obol"]["percent"] for event in crossed) == [50, 100]
    assert all(event["event_group"] == "team" and event["team_id"] == "red" for event in crossed), crossed
    assert own.stop() == 0
    listed = harness.run("report", "--alerts", "--format", "json", "--data-dir", str(own.data_dir))
    assert listed.returncode == 0, listed.stderr
    assert {event["id"] for event in events} <= {alert["id"] for alert in json.loads(listed.stdout)["alerts"]}
    shown = own.log_path.read_text() + listed.stdout
    assert "a-secret-path" not in shown, "a webhook's path may be a secret"
    assert "difference 0" in own.audit()
