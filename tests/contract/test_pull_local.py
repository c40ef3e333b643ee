"""Pulling from this machine: a GGUF file or a Hugging Face directory, whole or not at all."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvrelay.cli.app import app
from kvrelay.cli.up import with_model
from kvrelay.errors import ModelInvalid, PeerUnavailable
from kvrelay.store import install
from kvrelay.store.manifest import model_digest, models_dir, read_model_dir
from kvrelay.store.progress import Silent
from kvrelay.store.pull import ensure, pull
from kvrelay.supervise.topology import Topology
from tests.support import tiny_gguf

FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "manifest.json",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVRELAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return tiny_gguf.write_gguf(tmp_path / "My Model.gguf")


def left_behind() -> set[str]:
    """What stands beside the models: only locks may."""
    names = {path.name for path in models_dir().iterdir()}
    return {name for name in names if name.startswith(".") and not name.endswith(".lock")}


def test_a_gguf_file_becomes_a_whole_model_directory(gguf_file: Path) -> None:
    """Named after the file, with a manifest that matches every other file."""
    pulled = pull(str(gguf_file))
    assert pulled.path == models_dir() / "my-model"
    assert not pulled.was_present
    assert {path.name for path in pulled.path.iterdir()} == FILES
    model = read_model_dir(pulled.path)
    assert {file.name for file in model.files} == FILES - {"manifest.json"}
    assert left_behind() == set()


def test_a_second_pull_finds_it_there(gguf_file: Path) -> None:
    """Nothing is written again."""
    first = pull(str(gguf_file))
    written_ns = (first.path / "model.safetensors").stat().st_mtime_ns
    assert pull(str(gguf_file)).was_present
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written_ns


def test_force_does_it_again_and_gives_the_same_bytes(gguf_file: Path) -> None:
    """Conversion is deterministic, so workers pulled at different times still pair."""
    first = pull(str(gguf_file))
    manifest = (first.path / "manifest.json").read_bytes()
    (first.path / "stray").write_text("x")
    assert not pull(str(gguf_file), force=True).was_present
    assert (first.path / "manifest.json").read_bytes() == manifest
    assert not (first.path / "stray").exists()


def test_a_damaged_model_is_pulled_again(gguf_file: Path) -> None:
    """Found by its manifest, and said in one line."""
    first = pull(str(gguf_file))
    (first.path / "model.safetensors").write_bytes(b"short")
    progress = tiny_gguf.Recorder()
    assert not pull(str(gguf_file), progress=progress).was_present
    read_model_dir(first.path)
    assert "model.safetensors" in progress.notes[0]


def test_a_model_in_an_older_format_is_pulled_again(gguf_file: Path) -> None:
    """Without being asked to, whoever wants it; and said in one line."""
    first = pull(str(gguf_file))
    path = first.path / "manifest.json"
    for again in (pull, ensure):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
        progress = tiny_gguf.Recorder()
        again(str(gguf_file), progress=progress)
        read_model_dir(first.path)
        assert progress.notes == ["my-model is there in an older format; pulling it again"]


def test_a_known_model_in_an_older_format_is_fetched_again(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, when it is to be served."""
    name = "smollm2-135m-instruct"
    path = pull(str(gguf_file), name=name).path / "manifest.json"
    assert ensure(name) == path.parent
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerUnavailable, match="could not be downloaded"):
        ensure(name)


def test_blocks_of_a_quantized_file_come_along(tmp_path: Path) -> None:
    """Listed and hashed, and again when the directory is taken in as a checkpoint."""
    q4_1 = tiny_gguf.gguf.GGMLQuantizationType.Q4_1
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", types={"_proj": q4_1})
    progress = tiny_gguf.Recorder()
    first = pull(str(source), progress=progress)
    assert progress.stages == ["converting weights", "keeping quantized blocks"]
    assert progress.done_bytes == progress.totals_bytes
    assert {path.name for path in first.path.iterdir()} == FILES | {"blocks.safetensors"}

    copy = tmp_path / "copy"
    shutil.copytree(first.path, copy)
    (copy / "manifest.json").unlink()
    second = pull(str(copy))
    assert {path.name for path in second.path.iterdir()} == FILES | {"blocks.safetensors"}
    assert model_digest(second.path) == model_digest(copy) == model_digest(first.path)


def test_conversion_progress_reaches_its_total(gguf_file: Path) -> None:
    """The bar ends full."""
    progress = tiny_gguf.Recorder()
    pull(str(gguf_file), progress=progress)
    assert progress.stages == ["converting weights"]
    assert progress.done_bytes == progress.totals_bytes


def test_one_name_does_not_come_to_mean_another_model(gguf_file: Path, tmp_path: Path) -> None:
    """A second file of the same name is refused rather than ignored."""
    pull(str(gguf_file))
    (tmp_path / "other").mkdir()
    other = shutil.copy(gguf_file, tmp_path / "other" / gguf_file.name)
    with pytest.raises(ModelInvalid, match="already holds another model"):
        pull(str(other))
    assert pull(str(other), name="other").path.name == "other"


def test_a_failed_pull_leaves_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    """The model that was there before is still there, whole."""
    good = tiny_gguf.write_gguf(tmp_path / "m.gguf")
    pull(str(good))
    tiny_gguf.write_gguf(good, edit_tensors=lambda t: t.pop("output_norm.weight"))
    with pytest.raises(ModelInvalid, match=r"output_norm\.weight is missing"):
        pull(str(good), force=True)
    read_model_dir(models_dir() / "m")
    assert left_behind() == set()


def test_leftovers_of_a_killed_pull_are_cleared(gguf_file: Path) -> None:
    """A pull that was killed could not clean up; the next one does."""
    models_dir().mkdir(parents=True)
    (models_dir() / ".my-model.partial-abc").mkdir()
    pull(str(gguf_file))
    assert left_behind() == set()


def test_two_processes_pulling_at_once_write_it_once(gguf_file: Path) -> None:
    """The lock makes one of them wait and then find it there."""
    words = [sys.executable, "-m", "kvrelay.cli.app", "pull", str(gguf_file)]
    pulls = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0] for process in pulls)

    assert [process.returncode for process in pulls] == [0, 0]
    assert "is already there" in said[0]
    assert "is ready" in said[1]


def test_a_waiting_pull_says_so(gguf_file: Path) -> None:
    """Silence would look like a hang."""
    progress = tiny_gguf.Recorder()
    noted = threading.Event()
    progress.note = lambda message: (progress.notes.append(message), noted.set())  # type: ignore[method-assign]
    waiting = threading.Thread(target=pull, args=(str(gguf_file),), kwargs={"progress": progress})
    with install.locked(models_dir(), "my-model", progress=Silent()):
        waiting.start()
        assert noted.wait(timeout=30)
    waiting.join(timeout=30)
    assert "another pull of my-model" in progress.notes[0]
    read_model_dir(models_dir() / "my-model")


def test_a_hugging_face_directory_is_taken_in(gguf_file: Path, tmp_path: Path) -> None:
    """Known files come along, code does not."""
    source = tmp_path / "checkpoint"
    shutil.copytree(pull(str(gguf_file)).path, source)
    (source / "manifest.json").unlink()
    (source / "modeling.py").write_text("raise SystemExit")
    pulled = pull(str(source))
    assert {path.name for path in pulled.path.iterdir()} == FILES
    described = json.loads((pulled.path / "manifest.json").read_text())["source"]
    assert described == {"kind": "dir", "path": str(source)}


def test_symbolic_links_are_followed_to_their_files(gguf_file: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links; the model must outlive it."""
    blobs = pull(str(gguf_file)).path
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        if path.name != "manifest.json":
            (source / path.name).symlink_to(path)
    pulled = pull(str(source))
    assert not any(path.is_symlink() for path in pulled.path.iterdir())


def test_a_directory_with_only_pickled_weights_is_refused_by_name(tmp_path: Path) -> None:
    """The pickle is never opened."""
    source = tmp_path / "old"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelInvalid, match=r"pytorch_model\.bin: is a pickle"):
        pull(str(source))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_without_a_needed_file_is_refused_by_name(
    gguf_file: Path, tmp_path: Path, name: str
) -> None:
    """Before anything is copied."""
    source = tmp_path / "checkpoint"
    shutil.copytree(pull(str(gguf_file)).path, source)
    (source / "manifest.json").unlink()
    (source / name).unlink()
    with pytest.raises(ModelInvalid, match=rf"{name}.*missing"):
        pull(str(source))


@pytest.mark.parametrize("source", ["nothing", "", "no/such/deep/path", "/no/such.gguf"])
def test_a_source_that_is_nothing_says_what_could_be(source: str) -> None:
    """The error lists the kinds of sources and a command that works."""
    with pytest.raises(ModelInvalid, match="kvrelay pull smollm2-135m-instruct"):
        pull(source)


@pytest.mark.parametrize("name", ["../up", "A", "", ".hidden", "x" * 101])
def test_a_name_that_is_no_directory_name_is_refused(gguf_file: Path, name: str) -> None:
    """Nothing is ever written outside the store."""
    if name == "":
        assert pull(str(gguf_file), name=name).name == "my-model"
        return
    with pytest.raises(ModelInvalid, match="a model's name is"):
        pull(str(gguf_file), name=name)


def test_what_is_to_be_served_may_be_a_file_a_directory_or_a_name(gguf_file: Path) -> None:
    """A GGUF file is converted once; its directory and its name then mean the same."""
    progress = tiny_gguf.Recorder()
    converted = ensure(str(gguf_file), progress)
    assert converted == models_dir() / "my-model"
    assert progress.stages == ["converting weights"]
    assert ensure(str(gguf_file), progress) == converted
    assert ensure(str(converted)) == ensure("my-model") == converted
    assert len(progress.stages) == 1


def test_a_file_that_has_changed_is_converted_again(gguf_file: Path) -> None:
    """What is served is what the file holds now."""
    old = read_model_dir(ensure(str(gguf_file)))
    tiny_gguf.write_gguf(gguf_file, weights=tiny_gguf.random_weights("llama", seed=1))
    progress = tiny_gguf.Recorder()
    new = read_model_dir(ensure(str(gguf_file), progress))
    assert new.files != old.files
    assert "has changed" in progress.notes[0]


def test_up_converts_a_file_and_shows_that_it_does(gguf_file: Path) -> None:
    """The services are then given the directory."""
    shown = io.StringIO()
    topology = with_model(Topology(model=str(gguf_file)), Console(file=shown))
    assert topology.model == str(models_dir() / "my-model")
    assert "converting weights" in shown.getvalue()


def test_what_is_neither_there_nor_known_is_refused_with_a_way_out() -> None:
    """The error says how to get one."""
    with pytest.raises(ModelInvalid, match="no such model or directory; run: kvrelay pull"):
        ensure("something-else")


def test_without_the_hub_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that is optional to install here."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelInvalid, match=r"pip install 'kvrelay\[hub\]'"):
        pull("some-org/some-model")


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean error, not a stack of HTTP frames."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PeerUnavailable, match="could not be fetched from the hub"):
        pull("some-org/some-model")
    assert left_behind() == set()


def test_the_command_prints_plain_lines_off_a_terminal(gguf_file: Path) -> None:
    """The last line says where the model is; a second run says it was there."""
    result = CliRunner().invoke(app, ["pull", str(gguf_file)])
    assert result.exit_code == 0
    assert f"my-model is ready: {models_dir() / 'my-model'}" in result.output
    assert "converting weights" in result.output
    assert "\x1b" not in result.output
    again = CliRunner().invoke(app, ["pull", str(gguf_file)])
    assert again.exit_code == 0
    assert "my-model is already there" in again.output


def test_the_command_fails_with_one_line() -> None:
    """Exit status 1 and no traceback."""
    result = CliRunner().invoke(app, ["pull", "nothing"])
    assert result.exit_code == 1
    assert result.output.startswith("error: nothing: ")
    assert "Traceback" not in result.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_named(gguf_file: Path, cache: Path) -> None:
    """With the setting that moves it."""
    cache.mkdir(mode=0o500)
    result = CliRunner().invoke(app, ["pull", str(gguf_file)])
    assert result.exit_code == 1
    assert "KVRELAY_CACHE_DIR" in result.output
