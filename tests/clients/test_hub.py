"""Models by hub id, against a stand-in for the hub on this machine: fetched once, served, and without the hub again."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import harness
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


class Hub(ThreadingHTTPServer):
    """The three requests that fetching takes, for one repository: someone/some-model."""

    daemon_threads = True

    def __init__(self, files: dict[str, Path], token: str | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.token, self.asked = files, token, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> int:
        return sum("/resolve/" in path for path in self.asked)

    def tree(self) -> list[dict]:
        entries = []
        for path, file in self.files.items():
            content = file.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "oid": blob, "size": len(content), "path": path}
            if path.endswith(".gguf"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, unquote(self.path)
        hub.asked.append(path)
        if path == "/api/models/someone/some-model/revision/main":
            self.say({"id": "someone/some-model", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/someone/some-model/tree/{COMMIT}?recursive=true":
            self.say(hub.tree())
        elif hub.token and self.headers["authorization"] != f"Bearer {hub.token}":
            self.refuse(401, "GatedRepo")
        elif found := re.fullmatch(rf"/someone/some-model/resolve/{COMMIT}/(.*)", path):
            self.send(hub.files[found[1]])
        else:
            self.refuse(404, "RevisionNotFound" if "some-model" in path else "RepoNotFound")

    def say(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("x-error-code", code)
        self.send_header("content-length", "0")
        self.end_headers()

    def send(self, file: Path):
        self.send_response(200)
        self.send_header("content-length", str(file.stat().st_size))
        self.end_headers()
        with file.open("rb") as content:
            shutil.copyfileobj(content, self.wfile)

    def log_message(self, *_):
        pass


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("# A model\n")
    return path


def home(tmp_path: Path, hub: str) -> dict[str, str]:
    """A user who has never run the program and is not logged in."""
    return {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "HF_ENDPOINT": hub,
        "HF_TOKEN": "",
        "HF_HOME": str(tmp_path / "hub-home"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "NO_PROXY": "127.0.0.1",
    }


def test_a_model_is_pulled_served_by_its_id_and_served_again_without_the_hub(tmp_path, readme):
    hub = Hub({"README.md": readme, "some.Q4_1.gguf": Path(harness.model())})
    result = harness.run("pull", "someone/some-model", "--json", **home(tmp_path, hub.address))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    digest = hashlib.sha256(Path(harness.model()).read_bytes()).hexdigest()
    size = Path(harness.model()).stat().st_size
    assert found["model"] == "someone/some-model" and found["commit"] == COMMIT, found
    assert found["files"] == [{"path": "some.Q4_1.gguf", "size": size, "sha256": digest}], found
    assert hashlib.sha256(Path(found["path"]).read_bytes()).hexdigest() == digest
    assert hub.downloads() == 1

    plain = harness.run("pull", "someone/some-model:some.Q4_1.gguf", **home(tmp_path, hub.address))
    assert plain.stdout.strip() == found["path"] and hub.downloads() == 1, plain.stderr

    offline = harness.run("pull", "someone/some-model", **home(tmp_path, NOWHERE))
    assert offline.returncode == 1 and "could not fetch someone/some-model" in offline.stderr
    server = harness.Server(
        tmp_path / "ledger", "--max-model-len", "512", model_path="someone/some-model", **home(tmp_path, NOWHERE)
    )
    try:
        server.start()
        assert "using what main was when it was last fetched" in server.log()
        ids = [model["id"] for model in server.get("/v1/models").json()["data"]]
        assert ids == ["someone/some-model"], ids
        server.ok("/v1/completions", {"model": "someone/some-model", "prompt": "A", "max_tokens": 1})
    finally:
        server.kill()

    named = "someone/some-model:some.Q4_1.gguf"
    server = harness.Server(tmp_path / "ledger", "--max-model-len", "512", model_path=named, **home(tmp_path, NOWHERE))
    try:
        server.start()
        for name in (named, "someone/some-model", "default"):
            server.ok("/v1/completions", {"model": name, "prompt": "A", "max_tokens": 1})
    finally:
        server.kill()


def test_a_gated_model_takes_a_token_from_the_environment_or_the_file(tmp_path, readme):
    hub = Hub({"README.md": readme, "x.gguf": readme}, token="hf_secret")
    user = home(tmp_path, hub.address)
    refused = harness.run("pull", "someone/some-model", **user)
    assert refused.returncode == 1 and "licence" in refused.stderr and "HF_TOKEN" in refused.stderr, refused.stderr
    assert not list(tmp_path.rglob("*.gguf")), "what is not whole has not the file's name"
    wrong = harness.run("pull", "someone/some-model", **user | {"HF_TOKEN": "hf_other"})
    assert wrong.returncode == 1 and "does not open it" in wrong.stderr and "hf_other" not in wrong.stderr
    given = harness.run("pull", "someone/some-model", **user | {"HF_TOKEN": "hf_secret"})
    assert given.returncode == 0, given.stderr

    (tmp_path / "second").mkdir()
    user = home(tmp_path / "second", hub.address) | {"HF_HOME": str(tmp_path / "logged-in")}
    (tmp_path / "logged-in").mkdir()
    (tmp_path / "logged-in" / "token").write_text("hf_secret\n")
    assert harness.run("pull", "someone/some-model", **user).returncode == 0


@pytest.mark.parametrize(
    ("model", "flags", "code", "says"),
    [
        ("someone/some-model", [], 1, "obol serve --model someone/some-model:a.gguf"),
        ("someone/some-model", ["--revision", "v9"], 1, "no revision 'v9'"),
        ("someone/other", [], 1, "no model repository 'someone/other'"),
        ("someone/some-model:c.gguf", [], 1, "no file 'c.gguf'"),
        ("./someone/some-model", [], 2, "looks like a path"),
        ("smollm2-135m-instruct", ["--revision", "main"], 2, "has no revisions"),
    ],
)
def test_what_cannot_be_pulled_says_why(tmp_path, readme, model, flags, code, says):
    hub = Hub({"a.gguf": readme, "b.gguf": readme})
    result = harness.run("pull", model, *flags, **home(tmp_path, hub.address))
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert says in result.stderr and "panicked" not in result.stderr, result.stderr
    assert code == 1 or not hub.asked, "a path is not sent to the hub"
