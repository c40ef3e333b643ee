"""Workers whose KV differs, in block size, in dtype, or both: all pairs, with a real model.

The oracle has no handoff in it. A runner of the prefill worker's layout computes the prompt; each
head's numbers of each slot are taken from its bytes, put into what travels and then into what the
decode worker keeps, one after the other; a runner of that layout generates from them. What two
workers say must be exactly that.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.engine.plan import StepLimits
from kvrelay.kv import numbers
from kvrelay.kv.cache import TORCH_DTYPES, KvCache
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout
from kvrelay.model.generation_weights import Blocks
from kvrelay.model.load import layout_of
from kvrelay.native import library
from kvrelay.rpc import convert
from kvrelay.rpc.submit import ModelBounds
from kvrelay.types import Fingerprint, SamplingParams
from tests.support.tiny_model import runner_of, table, tiny_spec, tiny_weights, tokens
from tests.support.workers import (
    LANDING_NUM_BYTES,
    DecodeBench,
    PrefillBench,
    Session,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_of,
    ticket_of,
    tokens_of,
    until,
)

BLOCK_SIZES = (16, 32, 64)

WIRES = {
    ("bfloat16", "bfloat16"): "bfloat16",
    ("bfloat16", "fp8"): "fp8",
    ("bfloat16", "int8"): "int8",
    ("fp8", "bfloat16"): "fp8",
    ("fp8", "fp8"): "fp8",
    ("fp8", "int8"): "fp8",
    ("int8", "bfloat16"): "int8",
    ("int8", "fp8"): "int8",
    ("int8", "int8"): "int8",
}
"""What travels from one to the other if nothing was asked for."""

WAYS = [(p, "auto", wire, d) for (p, d), wire in WIRES.items()] + [
    ("bfloat16", "fp8", "fp8", "bfloat16"),
    ("bfloat16", "int8", "int8", "bfloat16"),
    ("bfloat16", "bfloat16", "bfloat16", "fp8"),
    ("bfloat16", "bfloat16", "bfloat16", "int8"),
]
"""Prefill worker's dtype, what the decode worker asks for, what that comes to, and its own."""

LENGTHS = (1, 15, 16, 17, 33, 64, 65, 130)
LONGER = 21
"""Tokens that are added to a prompt whose prefix the decode worker then knows."""

NUM_TOKENS = 8
NUM_SLOTS = 6144
TRANSPORTS = ("shm", "stream")

SPEC = tiny_spec()
BOUNDS = ModelBounds(vocab_size=SPEC.vocab_size, context_tokens=2048)
LIMITS = StepLimits(budget_tokens=96, max_chunk_tokens=24, max_sequences=32, max_waiting=1024)


@cache
def weights():
    return tiny_weights(SPEC, "bfloat16")


@contextlib.contextmanager
def runner(dtype: str, block_size: int) -> Iterator[tuple]:
    """The compiled engine where it can be had, torch where not."""
    is_native = library.why_not() is None
    with runner_of(
        SPEC,
        weights(),
        blocks=Blocks.none(SPEC) if is_native else None,
        kv_dtype=dtype,
        block_size=block_size,
        num_blocks=NUM_SLOTS // block_size,
        packs=True,
        landing_num_bytes=LANDING_NUM_BYTES,
    ) as made:
        yield made


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as both workers get it."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams

    @classmethod
    def of(cls, num_tokens: int) -> "Asked":
        """Greedy and sampled in turn; no two begin alike, but for those that are longer."""
        sampling = SamplingParams(temperature=0.9 * (num_tokens % 2), seed=num_tokens)
        return cls(tokens(num_tokens, num_tokens), sampling)

    @property
    def longer(self) -> "Asked":
        return replace(self, prompt_ids=self.prompt_ids + tokens(7, LONGER))


SHORT = [Asked.of(n) for n in LENGTHS]
LONG = [asked.longer for asked in SHORT]


# What should come out

Kept = tuple[bytes, bytes]
"""One head's values in one slot, and its scale if there is one, as they lie in a cache."""


class Oracle:
    """Runners of one dtype and of all block sizes, each with a cache of its own."""

    def __init__(self, dtype: str, stack: contextlib.ExitStack) -> None:
        self._dtype = dtype
        self._made = {size: stack.enter_context(runner(dtype, size)) for size in BLOCK_SIZES}

    def prefilled(self, asked: Asked) -> tuple[int, list[Kept]]:
        """The first token, and what is kept of the prompt: with every block size the same bits."""
        found = [self._prefilled(size, asked) for size in BLOCK_SIZES]
        assert found[0] == found[1] == found[2]
        token_id, kept, _ = found[0]
        return token_id, kept

    def continued(self, asked: Asked, first: int, kept: list[Kept]) -> tuple[int, ...]:
        """All tokens, with every block size from the same bits."""
        found = [self._continued(size, asked, first, kept) for size in BLOCK_SIZES]
        assert found[0] == found[1] == found[2]
        token_ids, _ = found[0]
        return token_ids

    def _prefilled(self, block_size: int, asked: Asked) -> tuple[int, list[Kept], bytes]:
        computes, memory = self._made[block_size]
        ids = asked.prompt_ids
        where = table(3, memory.layout.num_blocks_for(len(ids)))
        rows = Rows(
            path=Path.PROMPT, token_ids=ids, start=0, block_table=where, sample=asked.sampling
        )
        (token_id,) = computes.step([rows])
        kept = [_kept(memory, *place) for place in _places(memory, where, len(ids))]
        return token_id, kept, computes.step_logits([rows]).numpy().tobytes()

    def _continued(
        self, block_size: int, asked: Asked, first: int, kept: list[Kept]
    ) -> tuple[tuple[int, ...], bytes]:
        computes, memory = self._made[block_size]
        num_prompt = len(asked.prompt_ids)
        where = table(3, memory.layout.num_blocks_for(num_prompt + NUM_TOKENS))
        memory.bytes[:] = 0
        for place, each in zip(_places(memory, where, num_prompt), kept, strict=True):
            _keep(memory, *place, each)
        token_ids, logits = [first], b""
        while len(token_ids) < NUM_TOKENS:
            rows = Rows(
                path=Path.GENERATION,
                token_ids=(token_ids[-1],),
                start=num_prompt + len(token_ids) - 1,
                block_table=where,
                sample=asked.sampling,
            )
            token_ids += computes.step([rows])
            logits += computes.step_logits([rows]).numpy().tobytes()
        return tuple(token_ids), logits


def _places(memory: KvCache, where: Sequence[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
    """Block and number of every head's K and V, token by token."""
    layout = memory.layout
    for token in range(num_tokens):
        block, slot = where[token // layout.block_size], token % layout.block_size
        for layer, kv in itertools.product(range(layout.num_layers), (0, 1)):
            for head in range(layout.num_kv_heads):
                row = (layer * 2 + kv) * layout.block_size + slot
                yield block, row * layout.num_kv_heads + head


def _ranges(layout: KvLayout, block: int, index: int) -> tuple[slice, slice]:
    """Where values and scale of a block's head number `index` are."""
    first = block * layout.block_num_bytes
    size = layout.head_dim * DTYPE_NUM_BYTES[layout.dtype]
    values, scale = first + index * size, first + layout.values_num_bytes + 2 * index
    return slice(values, values + size), slice(scale, scale + 2 if layout.has_scales else scale)


def _kept(memory: KvCache, block: int, index: int) -> Kept:
    values, scale = _ranges(memory.layout, block, index)
    return memory.bytes[values].tobytes(), memory.bytes[scale].tobytes()


def _keep(memory: KvCache, block: int, index: int, kept: Kept) -> None:
    for where, what in zip(_ranges(memory.layout, block, index), kept, strict=True):
        memory.bytes[where] = np.frombuffer(what, dtype=np.uint8)


@cache
def as_dtype(kept: Kept, of: str, to: str) -> Kept:
    """The same numbers as another dtype keeps them."""
    if of == to:
        return kept
    values, scale = (
        torch.frombuffer(bytearray(it), dtype=torch.uint8) if it else None for it in kept
    )
    scales = None if scale is None else scale.view(torch.bfloat16)[0]
    found, scales = numbers.kept(numbers.read(values.view(TORCH_DTYPES[of]), scales), to)
    return (
        bytes(found.view(torch.uint8).tolist()),
        b"" if scales is None else bytes(scales.view(1).view(torch.uint8).tolist()),
    )


@cache
def expected(prefill: str, wire: str, decode: str) -> dict[Asked, tuple[int, ...]]:
    """Tokens of every request."""
    found = {}
    with contextlib.ExitStack() as stack:
        computes, generates = Oracle(prefill, stack), Oracle(decode, stack)
        for asked in SHORT + LONG:
            first, kept = computes.prefilled(asked)
            kept = [as_dtype(as_dtype(it, prefill, wire), wire, decode) for it in kept]
            found[asked] = generates.continued(asked, first, kept)
    return found


# What comes out


@dataclass(kw_only=True)
class Pool:
    """Workers of one dtype on each side, one of each block size, and a session with each."""

    holders: dict[int, tuple[PrefillBench, Session]]
    pullers: dict[int, tuple[DecodeBench, Session]]

    async def hand_over(
        self, asks: Sequence[Asked], *, emitted: dict[Asked, tuple[int, ...]] | None = None
    ) -> dict[tuple[int, int, Asked], list]:
        """Every request from every holder to every puller, all at once; what each puller said."""
        submitted: dict[str, tuple[int, int, Asked]] = {}
        for (i, asked), to, of in itertools.product(enumerate(asks), BLOCK_SIZES, BLOCK_SIZES):
            request_id = await self._submit(
                asked, of, to, TRANSPORTS[i % 2], (emitted or {}).get(asked, ())
            )
            submitted[request_id] = (of, to, asked)
        found = {}
        for to, (_, session) in self.pullers.items():
            got = await session.collect(*(r for r, (_, its, _) in submitted.items() if its == to))
            found |= {submitted[request_id]: outputs for request_id, outputs in got.items()}
        return found

    async def _submit(
        self, asked: Asked, of: int, to: int, transport: str, emitted: tuple[int, ...]
    ) -> str:
        (holder, prefills), (puller, decodes) = self.holders[of], self.pullers[to]
        handoff_id = new_id()
        common = {
            "request_id": new_id(),
            "max_tokens": NUM_TOKENS,
            "sampling": convert.sampling_to_wire(asked.sampling),
            # Each pair keeps to itself what it knows of prefixes.
            "cache_salt": f"{of} {to}".encode(),
        }
        ticket = ticket_of(
            holder, handoff_id, puller_id=puller.worker_id, puller_epoch=puller.epoch
        )
        source = pull_of(holder, handoff_id, transport, ticket=ticket)
        await decodes.submit(
            **decode_submit(asked.prompt_ids, pull=source, emitted_token_ids=emitted, **common)
        )
        await prefills.submit(
            **prefill_submit(
                asked.prompt_ids, handoff_id=handoff_id, puller_id=puller.worker_id, **common
            )
        )
        return common["request_id"]

    async def alone(self, asks: Sequence[Asked]) -> dict[tuple[int, Asked], tuple[int, ...]]:
        """What each decode worker says when it computes the prompt, too."""
        found = {}
        for size, (_, session) in self.pullers.items():
            submitted = {}
            for asked in asks:
                fields = decode_submit(
                    asked.prompt_ids,
                    max_tokens=NUM_TOKENS,
                    sampling=convert.sampling_to_wire(asked.sampling),
                    cache_salt=b"alone",
                )
                await session.submit(**fields)
                submitted[fields["request_id"]] = asked
            got = await session.collect(*submitted)
            found |= {(size, submitted[name]): tokens_of(outs) for name, outs in got.items()}
        return found

    async def is_idle(self) -> None:
        benches = [bench for bench, _ in (*self.holders.values(), *self.pullers.values())]
        await until(lambda: all(bench.engine.is_idle for bench in benches))


@contextlib.asynccontextmanager
async def pool(prefill: str, wire: str, decode: str) -> AsyncIterator[Pool]:
    """`wire`: what decode workers ask for."""
    async with contextlib.AsyncExitStack() as stack:
        holders, pullers = {}, {}
        for size in BLOCK_SIZES:
            bench = await stack.enter_async_context(
                prefill_worker(worker_id=f"p{size}", **_made(stack, prefill, size))
            )
            holders[size] = bench, await stack.enter_async_context(prefill_session(bench))
        for size in BLOCK_SIZES:
            names = {"worker_id": f"d{size}", "epoch": f"{size:016x}"}
            bench = await stack.enter_async_context(
                decode_worker(
                    wire_dtype=wire, max_landings=512, **names, **_made(stack, decode, size)
                )
            )
            pullers[size] = bench, await stack.enter_async_context(decode_session(bench))
        it = Pool(holders=holders, pullers=pullers)
        yield it
        await it.is_idle()


def _made(stack: contextlib.AsyncExitStack, dtype: str, block_size: int) -> dict:
    """Of either kind of worker."""
    made = stack.enter_context(runner(dtype, block_size))
    made[0].prove_rows()
    layout = made[1].layout
    fingerprint = Fingerprint(model_digest="00", numerics=made[0].numerics, layout=layout)
    return {"model": made, "limits": LIMITS, "bounds": BOUNDS, "fingerprint": fingerprint}


@pytest.mark.parametrize(("prefill", "asked_for", "wire", "decode"), WAYS)
async def test_tokens_are_those_of_each_layout_on_its_side(prefill, asked_for, wire, decode):
    """
    From each of three block sizes to each of three, many at once, and no more bytes than that
    takes; then longer prompts, of which the decode worker has what fills its own blocks; then
    what a caller had already is not said again.
    """
    tokens = expected(prefill, wire, decode)
    async with pool(prefill, asked_for, decode) as it:
        short = await it.hand_over(SHORT)
        long = await it.hand_over(LONG)
        had = await it.hand_over(LONG, emitted={asked: tokens[asked][:3] for asked in LONG})

    for (of, to, asked), outputs in (short | long).items():
        assert tokens_of(outputs) == tokens[asked], (of, to, len(asked.prompt_ids))
        travels = layout_of(SPEC, dtype=wire, block_size=of)
        num_known = 0
        if asked in LONG:
            num_known = (len(asked.prompt_ids) - LONGER) // to * to
        num_blocks = travels.num_blocks_for(len(asked.prompt_ids)) - num_known // of
        assert outputs[0].handoff.cached_prompt_tokens == num_known
        assert outputs[0].handoff.num_bytes == num_blocks * travels.block_num_bytes
    for (of, to, asked), outputs in had.items():
        assert outputs[0].position == 3
        assert tokens_of(outputs) == tokens[asked][3:], (of, to, len(asked.prompt_ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
async def test_block_sizes_show_in_no_token(dtype):
    """
    With one dtype on both sides, any two workers say what one says that does both.
    """
    async with pool(dtype, "auto", dtype) as it:
        alone = await it.alone(SHORT)
        found = await it.hand_over(SHORT)

    assert {asked: said for (_, asked), said in alone.items()} == {
        asked: tokens for asked, tokens in expected(dtype, dtype, dtype).items() if asked in SHORT
    }
    for (_, to, asked), outputs in found.items():
        assert tokens_of(outputs) == alone[to, asked]
