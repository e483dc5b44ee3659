"""Alerts as whoever is told of them meets them: a webhook that is down, then up; kill -9 in between; one of each."""

import http.server
import json
import shutil
import ssl
import subprocess
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
    """A webhook: keeps what it was sent, and answers with `status`. With a `certificate` (and its key) over TLS."""

    def __init__(self, certificate=None):
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
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake is the connection's own thread's: one that fails ends nobody else's.
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.server.handle_error = lambda *arguments: None
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server.server_port}/hook/a-secret-path"


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


def openssl(*arguments: str, cwd) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A directory with an authority of our own (`ca.pem`), and certificates of it: `good` for 127.0.0.1, `other` for
    another host; each with its key in one file.
    """
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    path = tmp_path_factory.mktemp("certificates")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj")
    openssl(*new, "/CN=An authority of the tests", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", cwd=path)
    for name, host in (("good", "IP:127.0.0.1"), ("other", "DNS:example.org")):
        openssl(*new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=path)
        (path / "extensions").write_text(f"subjectAltName={host}\nextendedKeyUsage=serverAuth\n")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
        openssl("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.crt", cwd=path)
        (path / f"{name}.pem").write_text((path / f"{name}.crt").read_text() + (path / f"{name}.key").read_text())
    return path


def dear(own: harness.Server) -> None:
    """A request that raises an alert."""
    body = {"model": "default", "messages": HELLO, "max_tokens": 2}
    assert httpx.post(f"{own.url}/v1/chat/completions", json=body, timeout=60).status_code == 200


def listed(own: harness.Server) -> list[dict]:
    result = harness.run("report", "--alerts", "--format", "json", "--data-dir", str(own.data_dir))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["alerts"]


def test_a_webhook_behind_an_authority_of_ones_own(tmp_path, certificates):
    trusted = Receiver(certificate=certificates / "good.pem")
    unknown, other = Receiver(certificate=certificates / "good.pem"), Receiver(certificate=certificates / "other.pem")
    for receiver in (trusted, unknown, other):
        receiver.status = 200
    ca = f'ca_file = "{certificates / "ca.pem"}"\n'
    hook = '[[alerts.webhooks]]\nurl = "{}"\n'
    config = '[alerts]\nrequest_cost = "0.000000000001"\n'
    config += hook.format(trusted.url) + ca + hook.format(unknown.url) + hook.format(other.url) + ca
    file = tmp_path / "obol.toml"
    file.write_text(config)
    flags = ("--max-model-len", "512", "--kv-memory", "64MiB", "--config", str(file))
    own = harness.Server(tmp_path / "data", *flags).start()
    dear(own)
    wait_until("the one that is trusted", lambda: len(trusted.events) == 1)

    def sends() -> dict[str, dict]:
        return {send["host"]: send for send in listed(own)[0]["sends"]}

    def host(receiver: Receiver) -> str:
        return f"127.0.0.1:{receiver.server.server_port}"

    wait_until("two tries of the others", lambda: all(sends()[host(hook)]["attempts"] >= 2 for hook in (unknown, other)))
    shown = sends()
    assert shown[host(trusted)]["sent_at"] and shown[host(trusted)]["error"] is None
    for receiver, word in ((unknown, "UnknownIssuer"), (other, "not valid for name")):
        send = shown[host(receiver)]
        assert send["sent_at"] is None and send["given_up_at"] is None, send
        assert "certificate" in send["error"] and word in send["error"], send
        assert receiver.events == [], "nobody is told whose certificate does not verify"
    table = harness.run("report", "--alerts", "--data-dir", str(own.data_dir)).stdout
    assert f"{host(trusted)}: sent" in table and f"{host(unknown)}: waits after " in table, table
    assert "certificate" in table and "a-secret-path" not in table, table
    assert own.stop() == 0

    # What was retried is told once the certificate is trusted.
    file.write_text(config.replace(hook.format(unknown.url), hook.format(unknown.url) + ca))
    own.start()
    wait_until("the one that is trusted now", lambda: len(unknown.events) == 1)
    assert len(trusted.events) == 1 and unknown.events == trusted.events, "each once"
    assert own.stop() == 0


def test_an_authority_that_is_no_certificate_is_an_error_at_the_start(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing\n")
    file = tmp_path / "obol.toml"
    file.write_text(f'[[alerts.webhooks]]\nurl = "https://127.0.0.1/x"\nca_file = "{tmp_path / "ca.pem"}"\n')
    arguments = ("--model", harness.model(), "--config", str(file), "--data-dir", str(tmp_path / "data"))
    result = harness.run("serve", *arguments)
    assert result.returncode == 2, result.stderr
    assert "alerts.webhooks 1: ca_file: it" in result.stderr
