"""The control plane's benchmark: real processes, every answer checked, two rates told."""

import json
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from pathlib import Path

import pytest

from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf

pytestmark = pytest.mark.e2e

FEW = (
    *("--callers", "3", "--tokens", "60", "--warm-up", "5", "--step-s", "0.002"),
    *("--rounds", "2", "--round-s", "0.5"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    source = tiny_gguf.write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
    gguf_model.convert(source, path, progress=Silent())
    return path


async def control(*arguments: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of `python -m kvrelay.bench.control`."""
    argv = (sys.executable, "-m", "kvrelay.bench.control", *arguments)
    process = await create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("connections", [(), ("--share-connection",)])
async def test_a_short_run_ends_well_and_tells_both_rates(
    model: Path, connections: tuple[str, ...]
) -> None:
    """Exit 0 says that each caller got each token of the script once, in its place."""
    status, out, err = await control("--model", str(model), *FEW, *connections, "--json")

    assert status == 0, err
    told = json.loads(out)
    assert told["num_answers"] > 0
    assert told["num_wrong"] == 0
    for one in told["rounds"]:
        assert one["elapsed_s"] >= 0.5, "a round's length depends on no caller"
        assert 0 < one["num_messages"] <= one["num_tokens"]
    assert told["tokens_per_s"] > 0
    assert "tokens a message" in err


async def test_a_model_that_is_not_there_ends_it_with_the_reason() -> None:
    """As the coordinator itself said it."""
    status, _, err = await control("--model", "no-such-model", *FEW)

    assert status == 1
    assert "no such model" in err
