"""Pulling from a hub that answers: a local server speaks the few calls that are needed."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from kvrelay.errors import ModelInvalid
from kvrelay.store import gguf_model
from kvrelay.store.manifest import models_dir, read_json, read_model_dir
from kvrelay.store.progress import Silent
from kvrelay.store.pull import pull
from tests.support import tiny_gguf

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, `org/tiny`."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        files = self.server.files
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        if self.path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()
            ]
            body, status = json.dumps(tree).encode(), 200
        elif self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(b)} for name, b in files.items()]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            body, status = json.dumps(info).encode(), 200
        elif self.path.removeprefix(prefix) in files:
            body, status = files[self.path.removeprefix(prefix)], 200
        else:
            body, status = b"{}", 404
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = tmp_path / "model"
    model.mkdir()
    gguf_model.convert(tiny_gguf.write_gguf(tmp_path / "m.gguf"), model, progress=Silent())
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    server = Hub({**files, "pytorch_model.bin": b"\x80", "modeling.py": b"raise SystemExit"})
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("KVRELAY_CACHE_DIR", str(tmp_path / "cache"))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_pulled_at_one_commit() -> None:
    """The manifest says which; pickles and code are not even asked for."""
    progress = tiny_gguf.Recorder()
    pulled = pull("org/tiny", progress=progress)
    assert pulled.path == models_dir() / "tiny"
    names = {file.name for file in read_model_dir(pulled.path).files}
    assert "model.safetensors" in names
    assert not names & {"pytorch_model.bin", "modeling.py"}
    source = read_json(pulled.path / "manifest.json")["source"]
    assert source == {"kind": "hub", "repo_id": "org/tiny", "commit": COMMIT}
    assert pull("org/tiny").was_present
    assert progress.stages[0] == "downloading"
    assert progress.done_bytes[0] == progress.totals_bytes[0] > 0


def test_a_model_the_hub_does_not_have_is_a_bad_name() -> None:
    """Not a network failure: trying again would not help."""
    with pytest.raises(ModelInvalid, match="the hub has no such model"):
        pull("org/other")
