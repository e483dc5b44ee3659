"""Fixtures: one server that most tests share, and a way to start others."""

import json
from pathlib import Path

import harness
import openai
import pytest

# Small enough to be cut by a test's prompt, large enough for every ordinary one.
CONTEXT = 2048


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> harness.Server:
    """The server that tests share: they may not stop it, and leave nothing running on it."""
    data_dir = tmp_path_factory.mktemp("shared") / "data"
    shared = harness.Server(data_dir, "--max-model-len", str(CONTEXT), "--queue-depth", "128")
    shared.start()
    yield shared
    assert shared.alive(), f"a test ended the server\n{shared.log()}"
    shared.wait_idle()
    assert shared.stop() == 0, shared.log()
    shared.audit()


@pytest.fixture
def start(tmp_path):
    """`start("--queue-depth", "1")` is a server of the test's own, over one data directory."""
    started: list[harness.Server] = []

    def make(*flags: str, **environment: str) -> harness.Server:
        own = harness.Server(tmp_path / f"data{len(started)}", *flags, **environment)
        started.append(own)
        return own.start()

    yield make
    for own in started:
        if own.alive():
            own.kill()


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def name(client) -> str:
    """The served model's id."""
    return client.models.list().data[0].id


@pytest.fixture(scope="session")
def golden() -> list[dict]:
    """llama.cpp's greedy output for twenty prompts; tests/golden/make_greedy.py wrote it."""
    path = Path(__file__).parents[1] / "golden" / "greedy.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


@pytest.fixture
def say(capsys):
    """`say(text)` shows a measured figure, in a passing test too."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return show
