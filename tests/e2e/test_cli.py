"""The `kvrelay` command as a person meets it: real processes, real exit statuses."""

import asyncio
import json
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from kvrelay.client import GenerateOptions, Message
from kvrelay.events import Delta
from kvrelay.store.pull import pull
from tests.support import tiny_gguf
from tests.support.deployment import Deployment, deployment

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

WITHIN_S = 60.0
READY_WITHIN_S = 15.0
QUESTION = "What is the capital of France?"
DEAD = "127.0.0.1:1"
COUNT = ("generate", "1, 2, 3, 4, 5, 6,", "--raw", "--temperature", "0", "--max-tokens", "4000")
"""Greedily, the model counts on and on."""

STORY = GenerateOptions(temperature=0.0, max_tokens=32)


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@asynccontextmanager
async def kvrelay(
    *arguments: str | bytes, stdin: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running command; killed if the test leaves it running."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli.app", *arguments),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(*arguments: str | bytes, stdin: bytes | None = None) -> Done:
    """Run a command to its end; without `stdin` there is nothing to read."""
    kind = asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE
    async with kvrelay(*arguments, stdin=kind) as process, asyncio.timeout(WITHIN_S):
        out, err = await process.communicate(stdin)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())


async def until_serving(running: Deployment, wanted: bool) -> None:
    """Wait until the coordinator says that it serves, or that it does not."""
    async with aclosing(running.client.watch_serving()) as states, asyncio.timeout(WITHIN_S):
        async for is_serving in states:
            if is_serving == wanted:
                return


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def module_loop() -> AsyncIterator[None]:
    """The event loop of this module, there before any test looks at what is open."""
    yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """One prefill and one decode worker that serve the real model."""
    async with deployment(
        "smollm2-135m-instruct",
        log_dir=tmp_path_factory.mktemp("logs"),
        flags=("--disaggregate", "always"),
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """What `kvrelay up` starts when nothing else is said, the real model included."""
    log_dir = tmp_path_factory.mktemp("logs")
    async with deployment("smollm2-135m-instruct", log_dir=log_dir) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    """A model that nobody has converted yet, served from its GGUF file."""
    place = tmp_path_factory.mktemp("gguf")
    gguf = tiny_gguf.write_gguf(place / "served.gguf")
    env = {"KVRELAY_CACHE_DIR": str(place / "cache")}
    async with deployment(gguf, log_dir=tmp_path_factory.mktemp("logs"), env=env) as running:
        yield running


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that loads at once and says nothing sensible."""
    place = tmp_path_factory.mktemp("tiny")
    gguf = tiny_gguf.write_gguf(place / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVRELAY_CACHE_DIR", str(place / "cache"))
        return pull(str(gguf)).path


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.realmodel
async def test_without_any_flag_it_is_ready_soon_and_hands_over(plain):
    """
    A prompt it has not seen crosses from one worker to the other: both count one handoff more.
    """
    await plain.until_idle()  # the canary has been counted
    before = handoffs(await status(plain))
    asked = ("generate", QUESTION, "--temperature", "0", "--max-tokens", "24")
    done = await run(*asked, "--target", plain.grpc)
    await plain.until_idle()

    assert plain.ready_s <= READY_WITHIN_S
    assert "Paris" in done.out
    after = handoffs(await status(plain))
    assert after == {name: count + 1 for name, count in before.items()}
    assert set(after) == {"prefill-0", "decode-0"}


def handoffs(pool: dict) -> dict[str, int]:
    return {worker["worker_id"]: worker["handoffs_total"] for worker in pool["workers"]}


@pytest.mark.realmodel
async def test_the_answer_is_streamed_as_text(real):
    """
    The question is put through the chat template, and the text ends with a newline.
    """
    done = await run(
        "generate", QUESTION, "--temperature", "0", "--max-tokens", "24", "--target", real.grpc
    )

    assert done.status == 0, done.err
    assert done.out == "The capital of France is Paris.\n"


@pytest.mark.realmodel
async def test_status_shows_the_handoff_that_was_made(real):
    """
    Both sides count it, and every worker tells all that the table promises.
    """
    await real.until_idle()
    before = handoffs(await status(real))
    await run("generate", QUESTION, "--max-tokens", "4", "--target", real.grpc)
    await real.until_idle()
    pool = await status(real)

    workers = {w["worker_id"]: w for w in pool["workers"]}
    assert pool["ready"] is True
    assert set(workers) == {"prefill-0", "decode-0"}
    for name, worker in workers.items():
        assert worker["handoffs_total"] == before[name] + 1
        assert worker["role"] == name.partition("-")[0]
        assert psutil.pid_exists(worker["pid"])
        blocks = worker["blocks"]
        assert blocks["free"] + blocks["cached"] + blocks["held"] == blocks["total"]
        assert {"shm", "stream"} <= set(worker["transports"])


async def status(running: Deployment) -> dict:
    return (await run("status", "--json", "--target", running.grpc)).json


@pytest.mark.realmodel
async def test_status_for_people_has_a_row_per_worker(real):
    """
    Without --json it is a table, whole even where the output is no terminal.
    """
    done = await run("status", "--target", real.grpc)

    rows = [line.split() for line in done.out.splitlines()]
    assert {row[0] for row in rows if row} >= {"ready", "worker", "prefill-0", "decode-0"}


@pytest.mark.realmodel
async def test_json_is_one_object_whose_numbers_add_up(real):
    """
    Text, tokens, usage and ledger agree with each other.
    """
    done = await run("generate", QUESTION, "--json", "--temperature", "0", "--target", real.grpc)

    answer, ledger = done.json, done.json["ledger"]
    assert one_line(done.out)
    assert answer["text"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert ledger["request_id"] == answer["request_id"]
    assert sum(ledger["ttft_stages"].values()) == pytest.approx(ledger["ttft_s"])
    assert sum(ledger["gap1_stages"].values()) == pytest.approx(ledger["gap1_s"])
    assert ledger["transport"] == "shm"


@pytest.mark.realmodel
async def test_the_seed_it_reports_gives_the_same_tokens_again(real):
    """
    A sampled answer can be had again, though nobody chose a seed the first time.
    """
    sampled = ("generate", "Tell me a story.", "--json", "--max-tokens", "24")
    first = (await run(*sampled, "--target", real.grpc)).json
    again = (await run(*sampled, "--seed", str(first["seed"]), "--target", real.grpc)).json

    assert again["token_ids"] == first["token_ids"]


@pytest.mark.realmodel
async def test_a_raw_prompt_from_stdin_is_continued_as_it_stands(real):
    """
    `-` reads the prompt, --raw leaves the chat template out, --stop ends before its text.
    """
    done = await run(
        *("generate", "-", "--raw", "--temperature", "0", "--max-tokens", "16"),
        *("--stop", ",", "--target", real.grpc),
        stdin=b"one, two, three, four,",
    )

    assert done.out.strip() == "five"


@pytest.mark.realmodel
async def test_the_ledger_is_drawn_after_the_text_and_by_explain(real):
    """
    Every stage is there, right after the answer and later by its id.
    """
    drawn = await run("generate", QUESTION, "--temperature", "0", "--ledger", "--target", real.grpc)
    answer = (
        await run("generate", "hi", "--max-tokens", "4", "--json", "--target", real.grpc)
    ).json
    explained = await run("explain", answer["request_id"], "--target", real.grpc)

    assert drawn.out.startswith("The capital of France is Paris.\n")
    for text in (drawn.out, explained.out):
        for stage in ("tokenize", "prefill", "first_token_return", "transfer", "first_step"):
            assert stage in text
    assert answer["request_id"] in explained.out


@pytest.mark.realmodel
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("hi", "--temperature", "nan"), "temperature"),
        (("hi", "--temperature", "-1"), "temperature"),
        (("hi", "--top-p", "0"), "top_p"),
        (("hi", "--max-tokens", "100000"), "max_tokens"),
        (("hi", "--stop", ""), "stop"),
        (("", "--raw"), "text"),
        ((b"\xff\xfe",), "PROMPT"),
    ],
)
async def test_a_bad_field_is_named_in_one_line(real, arguments, field):
    """
    Status 1, nothing on stdout, and the pool goes on serving.
    """
    done = await run("generate", *arguments, "--target", real.grpc)

    assert (done.status, done.out) == (1, "")
    assert one_line(done.err)
    assert field in done.err
    assert (await real.pool()).is_ready


@pytest.mark.realmodel
async def test_ctrl_c_cancels_the_request(real):
    """
    The command ends with status 130, and both workers are soon free.
    """
    async with kvrelay(*COUNT, "--target", real.grpc) as process, asyncio.timeout(WITHIN_S):
        assert process.stdout is not None
        await process.stdout.read(1)
        process.send_signal(signal.SIGINT)

        assert await process.wait() == 130
    await real.until_idle(within_s=5.0)


@pytest.mark.realmodel
async def test_a_reader_that_leaves_cancels_the_request(real):
    """
    As in `kvrelay generate ... | head`: no stack trace, and nothing goes on computing.
    """
    words = (sys.executable, "-m", "kvrelay.cli.app", *COUNT, "--target", real.grpc)
    process = await asyncio.create_subprocess_shell(
        f"{shlex.join(words)} | head -c 5",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WITHIN_S):
        out, err = await process.communicate()

    assert (len(out), err) == (5, b"")
    await real.until_idle(within_s=5.0)


@pytest.mark.realmodel
async def test_chat_remembers_until_it_is_reset(real):
    """
    The conversation grows with each turn, and /reset forgets it.
    """
    turns = f"{QUESTION}\n/reset\n\n{QUESTION}\n/quit\n".encode()
    done = await run("chat", "--temperature", "0", "--target", real.grpc, stdin=turns)

    assert done.status == 0, done.err
    assert done.out.count("The capital of France is Paris.") == 2


@pytest.mark.realmodel
async def test_ctrl_c_in_chat_stops_only_the_answer(real):
    """
    The request is cancelled at once, and the conversation goes on.
    """
    pipe = asyncio.subprocess.PIPE
    endless = ("chat", "--temperature", "0", "--max-tokens", "4000")
    async with kvrelay(*endless, "--target", real.grpc, stdin=pipe) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            chat.stdin.write(b"Count from 1 to 1000, separated by commas.\n")
            await chat.stdout.readexactly(len("> ") + 1)
            chat.send_signal(signal.SIGINT)
            await real.until_idle(within_s=5.0)
            out, _ = await chat.communicate(b"/quit\n")

            assert out.endswith(b"\n> ")
            assert await chat.wait() == 0


@pytest.mark.realmodel
async def test_health_is_an_exit_status(real):
    """
    0 for what serves; 1 and a line for what does not exist.
    """
    assert (await run("health", "--target", real.grpc)).status == 0
    known = await run("health", "--service", "kvrelay.v1.PoolService", "--target", real.grpc)
    assert known.status == 0
    unknown = await run("health", "--service", "nonsense", "--target", real.grpc)
    assert unknown.status == 1
    assert one_line(unknown.err)


@pytest.mark.parametrize(
    "command", [("generate", "hi"), ("status",), ("health",), ("explain", "0" * 32), ("chat",)]
)
async def test_a_dead_target_says_how_to_start_one(command):
    """
    One line and status 1, whatever was asked.
    """
    done = await run(*command, "--target", DEAD)

    assert (done.status, done.out) == (1, "")
    assert done.err == f"error: nothing answers at {DEAD}; start one with: kvrelay up\n"


async def test_a_target_that_is_no_address_is_a_usage_error():
    """
    Status 2, before anything is dialled.
    """
    done = await run("status", "--target", "nonsense")

    assert done.status == 2
    assert "HOST:PORT" in done.err


async def test_a_taken_port_is_named(tiny_model):
    """
    `up` starts nothing and says which flag chooses another.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = await run("up", "--model", str(tiny_model), "--http-port", str(port))

    assert (done.status, done.out) == (1, "")
    assert one_line(done.err)
    assert f"127.0.0.1:{port} is taken" in done.err
    assert "--http-port" in done.err


async def test_a_missing_model_is_named(tmp_path):
    """
    `up` says what it could be instead.
    """
    done = await run("up", "--model", str(tmp_path / "nowhere"))

    assert (done.status, done.out) == (1, "")
    assert one_line(done.err)
    assert "known: smollm2-135m-instruct; or a .gguf file" in done.err


async def test_a_truncated_model_is_named_with_the_process_that_refused_it(tiny_model, tmp_path):
    """
    `up` gives up at once: trying again would not help.
    """
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = await run("up", "--model", str(broken), "--grpc-port", "0", "--http-port", "0")

    assert (done.status, done.out) == (1, "")
    assert "model.safetensors" in done.err
    assert "error: coordinator exited with status 2" in done.err.splitlines()[-1]


async def test_a_gguf_file_is_served_as_it_is(tiny):
    """
    `up` converts it on its way, and it is called after the file.
    """
    done = await run("generate", "ab", "--raw", "--max-tokens", "4", "--target", tiny.grpc)

    assert done.status == 0, done.err
    assert (await tiny.client.model()).name == "served"


async def test_a_killed_worker_comes_back_under_its_name(tiny_model, tmp_path):
    """
    The same worker_id joins again with a new process and a new epoch, and serves.
    """
    async with deployment(tiny_model, log_dir=tmp_path) as running:
        old = (await running.worker("decode-0")).identity
        await running.signal("decode-0", signal.SIGKILL)
        new = (await running.until_restarted("decode-0", old_pid=old.pid)).identity
        done = await run("generate", "ab", "--raw", "--max-tokens", "4", "--target", running.grpc)

    assert new.epoch != old.epoch
    assert done.status == 0, done.err


async def test_a_killed_coordinator_comes_back_at_its_address(tiny_model, tmp_path):
    """
    Its port was chosen at random, yet workers and callers find it again.
    """
    async with deployment(tiny_model, log_dir=tmp_path) as running:
        coordinator = psutil.Process(running.coordinator_pid)
        coordinator.kill()
        psutil.wait_procs([coordinator], timeout=WITHIN_S)
        await until_serving(running, True)
        done = await run("generate", "ab", "--raw", "--max-tokens", "4", "--target", running.grpc)

    assert done.status == 0, done.err


async def test_killing_it_outright_leaves_no_process(tiny):
    """
    When `up` itself is killed by SIGKILL, everything it started dies with it.
    """
    services = psutil.Process(tiny.process.pid).children(recursive=True)
    tiny.process.kill()
    await tiny.process.wait()
    _, left = psutil.wait_procs(services, timeout=WITHIN_S)

    assert len(services) >= 3
    assert not left


@pytest.mark.realmodel
async def test_draining_lets_streams_finish(plain):
    """
    A request under way when SIGTERM comes is answered to its last token; then all end well.
    """
    async with asyncio.timeout(WITHIN_S):
        whole = await story(plain, lambda: None)
        token_ids = await story(plain, lambda: plain.process.send_signal(signal.SIGTERM))
        status = await plain.process.wait()

    assert len(token_ids) == STORY.max_tokens
    assert token_ids == whole
    assert status == 0


async def story(running: Deployment, at_first_token: Callable[[], None]) -> list[int]:
    """The tokens of a story, and something done while it is being told."""
    token_ids: list[int] = []
    events = running.client.generate([Message("user", "Tell a story.")], STORY)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                if not token_ids:
                    at_first_token()
                token_ids += event.token_ids
    return token_ids


@pytest.mark.realmodel
async def test_a_second_ctrl_c_does_not_wait(tmp_path):
    """
    The first drains, the second ends everything at once, and the status says so.
    """
    async with (
        deployment("smollm2-135m-instruct", log_dir=tmp_path) as running,
        kvrelay(*COUNT, "--target", running.grpc) as request,
    ):
        assert request.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            await request.stdout.read(1)
            running.process.send_signal(signal.SIGINT)
            await until_serving(running, False)
        running.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5.0):
            assert await running.process.wait() == 1
