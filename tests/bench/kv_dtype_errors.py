"""What other numbers of K and V do to logits, on a real model and real text.

1. each prompt is prefilled once with each dtype of KV
2. its blocks go to a cache of each other dtype, as a handoff would carry them
3. the tokens that bfloat16 says are forced on all, and all their logits compared with its
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from kvrelay.engine.batch import Path as NumericPath
from kvrelay.engine.batch import Rows
from kvrelay.kv import numbers
from kvrelay.kv.cache import KvCache
from kvrelay.model.load import CpuEngine, ModelRunner, layout_of, load_runner
from kvrelay.model.spec import read_spec
from kvrelay.types import BlockId

BLOCK_SIZE = 16
CHUNK = 256
NUM_FORCED = 16

Kept = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Way:
    """Dtypes of KV where the prompt is computed, on the way, and where tokens are generated."""

    prefill: str
    wire: str
    decode: str
    engine: CpuEngine = "native"


PLAIN = Way("bfloat16", "bfloat16", "bfloat16")

WAYS = (
    PLAIN,
    Way("bfloat16", "fp8", "fp8"),
    Way("bfloat16", "int8", "int8"),
    Way("fp8", "fp8", "bfloat16"),
    Way("fp8", "fp8", "fp8"),
    Way("fp8", "fp8", "int8"),
    Way("int8", "int8", "bfloat16"),
    Way("int8", "int8", "fp8"),
    Way("int8", "int8", "int8"),
    Way("bfloat16", "fp8", "bfloat16"),
    Way("bfloat16", "int8", "bfloat16"),
    Way("bfloat16", "bfloat16", "bfloat16", "torch"),
)
"""All that workers do unasked, then what `wire_dtype` has them do besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Of one way's logits against those of `PLAIN`, over all prompts."""

    way: Way
    where: str
    """`first`: after the prompt; `forced`: after each of the tokens that follow."""

    num_rows: int
    mean: float
    rms: float
    largest: float
    kl: float
    """Mean divergence, in nats."""

    top1: float
    """Share of rows in which the likeliest token is the same."""

    largest_gap: float
    """By how much `PLAIN` preferred its token where it is not the same; 0 if it always is."""


class Stand:
    """A runner and its cache, for one sequence at a time."""

    def __init__(self, runner: ModelRunner, cache: KvCache) -> None:
        self._runner = runner
        self._cache = cache
        self._table = [BlockId(i) for i in range(cache.num_blocks)]

    def prefill(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Logits of the next token, [vocab_size]."""
        edges = [*range(0, len(token_ids), CHUNK), len(token_ids)]
        for first, last in pairwise(edges):
            logits = self._logits(NumericPath.PROMPT, token_ids[first:last], first)
        return logits

    def forced(self, token_ids: list[int], start: int) -> torch.Tensor:
        """Logits after each token, which are generated ones from position `start` on."""
        rows = [
            self._logits(NumericPath.GENERATION, (token_id,), start + i)
            for i, token_id in enumerate(token_ids)
        ]
        return torch.stack(rows)

    def kept(self, num_blocks: int) -> Kept:
        scales = self._cache.scales
        return (
            self._cache.values[:num_blocks].clone(),
            None if scales is None else scales[:num_blocks].clone(),
        )

    def keep(self, kept: Kept, *, wire: str) -> None:
        """Take blocks of another cache, as they arrive in dtype `wire`."""
        dtype = self._cache.layout.dtype
        values, scales = _as(_as(kept, wire), dtype)
        num_blocks = len(values)
        self._cache.values.view(torch.uint8)[:num_blocks].copy_(values.view(torch.uint8))
        if self._cache.scales is not None:
            assert scales is not None
            self._cache.scales[:num_blocks].copy_(scales)

    def _logits(self, path: NumericPath, token_ids: tuple[int, ...], start: int) -> torch.Tensor:
        rows = Rows(
            path=path, token_ids=token_ids, start=start, block_table=self._table, sample=None
        )
        return self._runner.step_logits([rows])[0]


def measured(model_dir: Path, prompts: list[tuple[int, ...]], *, num_threads: int) -> list[Error]:
    """Of every way, after the prompts and after the tokens that follow."""
    longest = max(len(prompt) for prompt in prompts) + NUM_FORCED
    sums = {(way, where): _Sum() for way in WAYS for where in ("first", "forced")}
    with stands(model_dir, longest, num_threads=num_threads) as by_kind:
        for prompt in prompts:
            _compare(by_kind, prompt, sums)
    return [each.error(way, where) for (way, where), each in sums.items()]


@contextmanager
def stands(
    model_dir: Path, num_tokens: int, *, num_threads: int
) -> Iterator[dict[tuple[CpuEngine, str], Stand]]:
    kinds = {(way.engine, dtype) for way in (PLAIN, *WAYS) for dtype in (way.prefill, way.decode)}
    caches: list[KvCache] = []
    spec = read_spec(model_dir)
    try:
        found = {}
        for engine, kv_dtype in sorted(kinds):
            layout = layout_of(spec, dtype=kv_dtype, block_size=BLOCK_SIZE)
            cache = KvCache(layout, layout.num_blocks_for(num_tokens), shareable=False)
            caches.append(cache)
            runner, _ = load_runner(
                model_dir,
                spec,
                cache,
                engine=engine,
                generation_weights="auto",
                num_threads=num_threads,
                dtype="bfloat16",
            )
            found[engine, kv_dtype] = Stand(runner, cache)
        yield found
    finally:
        for cache in caches:
            cache.close()


def _compare(
    by_kind: dict[tuple[CpuEngine, str], Stand],
    prompt: tuple[int, ...],
    sums: dict[tuple[Way, str], "_Sum"],
) -> None:
    num_blocks = -(-len(prompt) // BLOCK_SIZE)
    firsts, kept = {}, {}
    for kind in {(way.engine, way.prefill) for way in (PLAIN, *WAYS)}:
        firsts[kind] = by_kind[kind].prefill(prompt)
        kept[kind] = by_kind[kind].kept(num_blocks)
    plain = by_kind[PLAIN.engine, PLAIN.decode]
    plain_first = firsts[PLAIN.engine, PLAIN.prefill]
    token_ids: list[int] = []
    rows = [plain_first]
    for i in range(NUM_FORCED):
        token_ids.append(int(rows[-1].argmax()))
        rows.append(plain.forced(token_ids[-1:], len(prompt) + i)[0])
    expected = torch.stack(rows[1:])
    for way in WAYS:
        sums[way, "first"].add(firsts[way.engine, way.prefill][None], plain_first[None])
        stand = by_kind[way.engine, way.decode]
        stand.keep(kept[way.engine, way.prefill], wire=way.wire)
        sums[way, "forced"].add(stand.forced(token_ids, len(prompt)), expected)


def _as(kept: Kept, dtype: str) -> Kept:
    """The same KV in another dtype; what is of that dtype is left alone."""
    if _NAMES[kept[0].dtype] == dtype:
        return kept
    return numbers.kept(numbers.read(*kept), dtype)


_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}


class _Sum:
    """Of errors, row by row."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._absolute = self._square = self._kl = 0.0
        self._largest = self._largest_gap = 0.0
        self._num_same = 0

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Both [num_rows, vocab_size]."""
        difference = (found - expected).double()
        self._num_rows += len(found)
        self._absolute += float(difference.abs().mean(dim=-1).sum())
        self._square += float(difference.square().mean(dim=-1).sum())
        self._largest = max(self._largest, float(difference.abs().max()))
        log_p, log_q = (it.double().log_softmax(dim=-1) for it in (expected, found))
        self._kl += float((log_p.exp() * (log_p - log_q)).sum())
        chosen = found.argmax(dim=-1, keepdim=True)
        gap = expected.amax(dim=-1) - expected.gather(1, chosen)[:, 0]
        self._num_same += int((chosen[:, 0] == expected.argmax(dim=-1)).sum())
        self._largest_gap = max(self._largest_gap, float(gap.max()))

    def error(self, way: Way, where: str) -> Error:
        return Error(
            way=way,
            where=where,
            num_rows=self._num_rows,
            mean=self._absolute / self._num_rows,
            rms=(self._square / self._num_rows) ** 0.5,
            largest=self._largest,
            kl=self._kl / self._num_rows,
            top1=self._num_same / self._num_rows,
            largest_gap=self._largest_gap,
        )
