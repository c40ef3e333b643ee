"""One pool of workers whose KV differs: real processes, the real model.

The oracle computes in this process and hands nothing over: what the prefill worker keeps of a
prompt, put into the dtype that travels and then into the decode worker's, is continued there.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from kvrelay.client import Pool
from kvrelay.kv.cache import KvCache
from kvrelay.model.load import layout_of, load_runner
from kvrelay.model.spec import read_spec
from tests.bench.kv_dtype_errors import BLOCK_SIZE, Stand
from tests.support.asking import Answer, Ask, deployed
from tests.support.deployment import Deployment
from tests.support.prompts import prompts

pytestmark = [pytest.mark.e2e, pytest.mark.realmodel, pytest.mark.timeout(180)]

ALWAYS = ("--disaggregate", "always")
ENDED_WITHIN_S = 30.0


class Oracle:
    """What a prefill worker with bfloat16 KV and any decode worker must say together."""

    def __init__(self, model_dir: Path, dtypes: Sequence[str], stack: ExitStack) -> None:
        self._spec = read_spec(model_dir)
        self._stands = {dtype: self._stand(model_dir, dtype, stack) for dtype in dtypes}

    def tokens(self, ask: Ask, *, wire: str, decode: str) -> list[int]:
        """Greedy."""
        num_prompt = len(ask.prompt_ids)
        prefills, generates = self._stands["bfloat16"], self._stands[decode]
        logits = prefills.prefill(ask.prompt_ids)
        generates.keep(prefills.kept(-(-num_prompt // BLOCK_SIZE)), wire=wire)
        token_ids = [int(logits.argmax())]
        while len(token_ids) < ask.max_tokens:
            (logits,) = generates.forced(token_ids[-1:], num_prompt + len(token_ids) - 1)
            token_ids.append(int(logits.argmax()))
        return token_ids

    def num_bytes(self, ask: Ask, *, wire: str) -> int:
        """That travel, if nothing of it is known where it is going to."""
        layout = layout_of(self._spec, dtype=wire, block_size=BLOCK_SIZE)
        return layout.num_blocks_for(len(ask.prompt_ids)) * layout.block_num_bytes

    def _stand(self, model_dir: Path, dtype: str, stack: ExitStack) -> Stand:
        layout = layout_of(self._spec, dtype=dtype, block_size=BLOCK_SIZE)
        memory = KvCache(layout, layout.num_blocks_for(512), shareable=False)
        stack.callback(memory.close)
        computes, _ = load_runner(
            model_dir,
            self._spec,
            memory,
            engine="auto",
            generation_weights="auto",
            num_threads=2,
            dtype="bfloat16",
        )
        return Stand(computes, memory)


@pytest.fixture(scope="module")
def oracle(real_model) -> Iterator[Oracle]:
    with ExitStack() as stack:
        yield Oracle(real_model, ("bfloat16", "int8", "fp8"), stack)


@pytest.fixture
def asks(real_model) -> list[Ask]:
    """Each with a prefix of its own, of 31 to 180 tokens."""
    return [Ask(prompt_ids, 16) for prompt_ids in prompts(real_model)[10:34]]


@asynccontextmanager
async def joined(
    it: Deployment, model: Path, worker_id: str, *flags: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """One more decode worker in the pool, which must end well by itself when told to drain."""
    with (it.log_dir / f"{worker_id}.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "decode_svc", "--model", str(model)),
            *("--coordinator", it.grpc, "--worker-id", worker_id, "--listen", "127.0.0.1:0"),
            *flags,
            stdout=log,
            stderr=log,
        )
    try:
        await it.until(lambda pool: worker_id in _names(pool), within_s=60.0)
        yield process
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(ENDED_WITHIN_S):
            assert await process.wait() == 0
        await it.until(lambda pool: worker_id not in _names(pool))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _names(pool: Pool) -> set[str]:
    return {m.identity.worker_id for m in pool.members}


def require(oracle: Oracle, asks, answers, *, travels: dict[str, str], keeps: dict[str, str]):
    """Every answer is the oracle's for the worker that gave it, and took no more bytes than that.

    Args:
        oracle: of the model.
        asks: what was asked.
        answers: to each.
        travels: dtype of what comes to each decode worker.
        keeps: dtype of what each keeps.
    """
    for ask, answer in zip(asks, answers, strict=True):
        worker = answer.ledger.decode_worker
        wire, decode = travels[worker], keeps[worker]
        assert answer.token_ids == oracle.tokens(ask, wire=wire, decode=decode), worker
        assert answer.ledger.handoff_num_bytes == oracle.num_bytes(ask, wire=wire)


async def test_one_prefill_worker_serves_decode_workers_of_every_dtype(
    real_model, tmp_path, monkeypatch, oracle, asks
):
    """
    With three block sizes between them: each says what its own KV makes of the prompt's, and those
    that keep fewer bytes are sent as few.
    """
    monkeypatch.setenv("KVRELAY_DECODE_BLOCK_SIZE", "64")
    async with (
        deployed(real_model, tmp_path, *ALWAYS) as (it, asker),
        joined(it, real_model, "int8", "--block-size", "32", "--kv-dtype", "int8"),
        joined(it, real_model, "fp8", "--block-size", "16", "--kv-dtype", "fp8"),
    ):
        answers = await asker.all(asks, at_once=12)

    keeps = {"decode-0": "bfloat16", "int8": "int8", "fp8": "fp8"}
    require(oracle, asks, answers, travels=keeps, keeps=keeps)
    assert {answer.ledger.decode_worker for answer in answers} == set(keeps)
    plain, int8, fp8 = (oracle.num_bytes(asks[0], wire=dtype) for dtype in keeps.values())
    assert fp8 == plain / 2
    assert int8 < 0.52 * plain


async def test_streams_move_between_block_sizes_and_keep_their_tokens(
    real_model, tmp_path, monkeypatch, oracle, asks
):
    """
    A worker with blocks of 32 slots drains to one of 64, while prompts come to both in int8, in
    half the bytes, though nobody keeps it. What moves comes as it is kept.
    """
    monkeypatch.setenv("KVRELAY_DECODE_BLOCK_SIZE", "64")
    monkeypatch.setenv("KVRELAY_COORDINATOR_HEARTBEAT_INTERVAL_S", "0.1")
    asks = [Ask(ask.prompt_ids, 256) for ask in asks[:6]]
    flags = ("--wire-dtype", "int8")
    async with (
        deployed(real_model, tmp_path, *ALWAYS, *flags) as (it, asker),
        joined(it, real_model, "leaves", "--block-size", "32", *flags) as leaves,
    ):
        asking = asyncio.create_task(asker.all(asks, at_once=len(asks)))
        await it.until(lambda pool: _num_running(pool, "leaves") > 1)
        leaves.send_signal(signal.SIGTERM)
        answers: list[Answer] = await asking

    moved = {i for i, answer in enumerate(answers) if answer.ledger.move_gaps_s}
    assert moved
    assert {answers[i].ledger.decode_worker for i in moved} == {"decode-0"}
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        assert answer.token_ids == oracle.tokens(ask, wire="int8", decode="bfloat16")
        assert (answer.ledger.attempts, list(answer.ledger.lost_attempts)) == (1, [])
        if i not in moved:
            assert answer.ledger.handoff_num_bytes == oracle.num_bytes(ask, wire="int8")
            assert answer.ledger.handoff_num_bytes < 0.52 * oracle.num_bytes(ask, wire="bfloat16")


def _num_running(pool: Pool, worker_id: str) -> int:
    return sum(m.load.running_sequences for m in pool.members if m.identity.worker_id == worker_id)
