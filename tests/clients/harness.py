"""Runs the real server binary for tests and talks to it with nothing but the standard library.

Knows how the program is started, made ready and stopped, and how HTTP looks on the wire. Knows nothing
of what an answer should be: that is in the tests. OBOL_BIN and OBOL_TEST_MODEL say what to run.
"""

import atexit
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

READY_SECONDS = 120


def required(name: str) -> str:
    """An environment variable that scripts/test sets."""
    value = os.environ.get(name)
    assert value, f"{name} is not set: run scripts/test, which builds the server and fetches the model"
    assert Path(value).exists(), f"{name}={value} does not exist: run scripts/test"
    return value


def binary() -> str:
    return required("OBOL_BIN")


def model() -> str:
    return required("OBOL_TEST_MODEL")


def embedding_model() -> str:
    """The catalog's encoder, which scripts/test fetches beside the default model."""
    path = Path(model()).parent / "all-minilm-l6-v2"
    assert path.exists(), f"{path} does not exist: run scripts/test"
    return str(path)


def clean_environment() -> dict[str, str]:
    """Ours without OBOL_*: a test's server is configured by its flags alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OBOL_")}


def flags_of_all() -> list[str]:
    """More flags for every server, from OBOL_TEST_FLAGS: the device under test, say."""
    return shlex.split(os.environ.get("OBOL_TEST_FLAGS", ""))


def long(tokens: int) -> int:
    """The length of an answer that should take long: shorter where the device is emulated, and slow."""
    return tokens // 5 if "OBOL_TEST_EMULATED" in os.environ else tokens


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command of the program, to its end, with these variables over ours."""
    return subprocess.run(
        [binary(), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment() | environment,
        cwd=tempfile.gettempdir(),  # no obol.toml of this folder's
        stdin=subprocess.DEVNULL,
        check=False,
    )


def interrupted(*arguments: str, at: str, cwd: Path, **environment: str) -> str:
    """Runs the binary in `cwd` and interrupts it once a line on stderr has `at`; it must not end well. Its stdout."""
    process = subprocess.Popen(
        [binary(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | environment,
        cwd=cwd,
        # What runs in a shell's background is started with interrupts ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stderr:
            if at in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
        return process.stdout.read()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self):
        return json.loads(self.body)

    def error(self) -> dict:
        """The error object, which has its four members always."""
        error = self.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"], error
        return error


class Stream:
    """A streamed answer that is still coming."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse):
        self.connection, self.response = connection, response
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.done = False

    def events(self):
        """The `data:` payloads as objects, until `[DONE]` or the end of the connection."""
        while line := self.response.readline():
            text = line.decode().rstrip("\n").rstrip("\r")
            if not text.startswith("data:"):
                assert text == "" or text.startswith(":"), f"not an event: {text!r}"
                continue
            data = text.removeprefix("data:").strip()
            if data == "[DONE]":
                self.done = True
                self.response.read()
                return
            yield json.loads(data)

    def close(self) -> None:
        """Hangs up, whatever is still to come."""
        if self.connection.sock is not None:
            self.connection.sock.close()
        self.response.close()
        self.connection.close()


class Server:
    """One server process over one data directory; may be started again after it stopped."""

    def __init__(self, data_dir: Path, *flags: str, model_path: str | None = None, **environment: str):
        self.data_dir, self.flags, self.model_path = data_dir, flags, model_path or model()
        self.environment = environment
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self.port = 0
        self.process: subprocess.Popen | None = None

    # ---- the process

    def start(self, *more: str) -> "Server":
        self.port = free_port()
        command = [
            binary(),
            "serve",
            "--model",
            self.model_path,
            "--listen",
            f"127.0.0.1:{self.port}",
            "--data-dir",
            str(self.data_dir),
            *flags_of_all(),
            *self.flags,
            *more,
        ]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment() | self.environment,
                cwd=self.data_dir.parent,
            )
        atexit.register(self.abandon, self.process)
        self.wait_ready()
        return self

    @staticmethod
    def abandon(process: subprocess.Popen) -> None:
        """A test that failed leaves its server behind; it ends with the tests."""
        if process.poll() is None:
            process.kill()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            code = self.process.poll()
            assert code is None, f"the server stopped with {code} before it was ready\n{self.log()}"
            try:
                if self.get("/ready").status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready within {READY_SECONDS} s\n{self.log()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")[-4000:]

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM and the exit code; kills and fails if it takes too long."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM did not stop the server in {timeout} s\n{self.log()}") from None

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(30)

    # ---- HTTP

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict | None = None
    ) -> Answer:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body, headers: dict | None = None) -> Answer:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, payload, {"content-type": "application/json", **(headers or {})})

    def ok(self, path: str, body, headers: dict | None = None) -> dict:
        answer = self.post(path, body, headers)
        assert answer.status == 200, (answer.status, answer.body[:2000])
        return answer.json()

    def stream(self, path: str, body: dict, headers: dict | None = None) -> Stream:
        connection = self.connect()
        payload = json.dumps({**body, "stream": True}).encode()
        connection.request("POST", path, payload, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read()
            connection.close()
            raise AssertionError((response.status, text[:2000]))
        return Stream(connection, response)

    # ---- what it knows

    def receipt(self, request_id: str) -> dict:
        answer = self.get(f"/v1/requests/{request_id}")
        assert answer.status == 200, (request_id, answer.status, answer.body[:500])
        return answer.json()

    def metrics(self) -> "Metrics":
        answer = self.get("/metrics")
        assert answer.status == 200, answer.status
        return Metrics(answer.body.decode())

    def wait_idle(self, seconds: float = 60) -> "Metrics":
        """Until nothing runs or waits and no block is held, as /metrics says."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            state = {name: metrics.total(name) for name in names}
            if not any(state.values()):
                return metrics
            assert time.monotonic() < deadline, f"still busy after {seconds} s: {state}"
            time.sleep(0.05)

    def audit(self) -> str:
        """`obol audit` over this server's data directory, which may be in use; fails unless it adds up."""
        result = run("audit", "--data-dir", str(self.data_dir))
        text = result.stdout + result.stderr
        assert result.returncode == 0, text
        assert "reconciled: difference 0" in text, text
        return text


class Metrics:
    """Prometheus' text format, strictly read."""

    SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")
    LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

    def __init__(self, text: str):
        self.types: dict[str, str] = {}
        self.samples: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                assert name not in self.types, f"two TYPE lines for {name}"
                self.types[name] = kind
            elif line and not line.startswith("#"):
                match = self.SAMPLE.match(line)
                assert match, f"not a sample: {line!r}"
                labels = dict(self.LABEL.findall(match[2] or ""))
                self.samples.append((match[1], labels, float(match[3])))

    def values(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [(labels, value) for sample, labels, value in self.samples if sample == name]

    def total(self, name: str) -> float:
        found = self.values(name)
        assert found, f"no sample of {name}"
        return sum(value for _, value in found)
