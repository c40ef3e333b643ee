"""What a step tells the device: generated rows in buckets of fixed shape, prompts as they come.

A bucket is a number of rows and a number of key splits, both powers of two. Its inputs always
lie at the same addresses, so its forward pass is recorded once and then replayed. Rows of
padding have negative positions: they compute nothing that anybody sees, and write no KV.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kernels.few_rows import MAX_ROWS
from kvrelay.kernels.generation_attention import SPLIT
from kvrelay.kernels.lang import power_of_2
from kvrelay.kernels.prompt_attention import QueryTiles, query_tiles
from kvrelay.kernels.sampling import Choices
from kvrelay.model.cuda_device import Tray
from kvrelay.model.cuda_forward import PlacedRows
from kvrelay.model.sampler import draw
from kvrelay.types import BlockId, SamplingParams

MAX_ROW_SPLITS = 16384
"""Most rows times splits in one bucket: bounds what attention keeps between its two kernels."""

TABLE_MULTIPLE = 16
WORDS_ALIGNED = 4
"""Everything in a tray begins at a multiple of 16 bytes. Triton compiles another kernel for
another alignment, and no request shall wait for that."""

_CHOICE_WORDS = 5


@dataclass(frozen=True, slots=True)
class Bucket:
    num_rows: int
    num_splits: int


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One generated token to compute, and how the next is chosen if it is."""

    token_id: int
    position: int
    block_table: Sequence[BlockId]
    run: int | None
    """Which of the batch's `Rows` it is the last of, if of any."""

    sample: SamplingParams | None


def slices(
    rows: Sequence[GenerationRow], *, max_rows: int = MAX_ROWS
) -> Iterator[Sequence[GenerationRow]]:
    """Rows that share a bucket, at most `max_rows`. In order of position, so that a sequence's
    earlier tokens are never computed after its later ones.
    """
    ordered = sorted(rows, key=lambda row: row.position)
    while ordered:
        size = max_rows
        while size > 1 and size * bucket_of(ordered[:size]).num_splits > MAX_ROW_SPLITS:
            size //= 2
        yield ordered[:size]
        ordered = ordered[size:]


def bucket_of(rows: Sequence[GenerationRow]) -> Bucket:
    longest = max(row.position for row in rows) + 1
    return Bucket(power_of_2(len(rows)), power_of_2(-(-longest // SPLIT)))


def table_width(num_keys: int, block_size: int) -> int:
    """Blocks in a table that reaches `num_keys`, rounded up for aligned rows."""
    return _rounded_up(-(-num_keys // block_size), TABLE_MULTIPLE)


class ChoiceTray:
    """How rows are sampled, and what was chosen."""

    def __init__(self, num_rows: int, tray: Tray, first_word: int, device: torch.device) -> None:
        words = slice(first_word, first_word + self.num_words(num_rows))
        self._host = tray.host[words].numpy().reshape(_CHOICE_WORDS, -1)
        there = tray.there[words].view(_CHOICE_WORDS, -1)[:, :num_rows]
        floats = there.view(torch.float32)
        self.choices = Choices(floats[0], there[1], floats[2], floats[3], floats[4])
        self.chosen = torch.zeros(num_rows, dtype=torch.int32, device=device)

    @staticmethod
    def num_words(num_rows: int) -> int:
        return _rounded_up(num_rows, WORDS_ALIGNED) * _CHOICE_WORDS

    def write(self, rows: Sequence[tuple[SamplingParams | None, int]]) -> None:
        """Parameters of each row, and the absolute position of the token to choose."""
        floats = self._host.view(np.float32)
        self._host[:] = 0  # greedy
        for i, (params, position) in enumerate(rows):
            if params is not None and params.temperature > 0:
                self._host[1, i] = params.top_k
                uniform = draw(params.seed, position)
                floats[[0, 2, 3, 4], i] = params.temperature, params.top_p, params.min_p, uniform

    def fetched(self) -> torch.Tensor:
        """Begin to copy what was chosen into memory of its own: the next step of this bucket
        chooses again before anybody has looked.
        """
        is_locked = self.chosen.device.type == "cuda"
        host = torch.empty(self.chosen.shape, dtype=torch.int32, pin_memory=is_locked)
        return host.copy_(self.chosen, non_blocking=True)


class GenerationStep:
    """One bucket's inputs and outputs, at addresses that stay."""

    def __init__(self, bucket: Bucket, *, block_size: int, device: torch.device) -> None:
        rows = bucket.num_rows
        width = table_width(bucket.num_splits * SPLIT, block_size)
        self.bucket = bucket
        sizes = (rows, rows, rows * width)
        first_choice = _num_words(sizes)
        self._tray = Tray(first_choice + ChoiceTray.num_words(rows), device)
        self._ids, self._positions, self._tables = _parts(self._tray.host.numpy(), sizes)
        ids, positions, tables = _split(self._tray.there, sizes)
        self.rows = PlacedRows(
            token_ids=ids,
            positions=positions,
            row_tables=torch.arange(rows, dtype=torch.int32, device=device),
            block_tables=tables.view(rows, width),
        )
        self.sampling = ChoiceTray(rows, self._tray, first_choice, device)

    def send(self, rows: Sequence[GenerationRow]) -> None:
        """Fill the inputs and begin to copy them."""
        self._tray.wait()
        self._ids[:] = 0
        self._positions[:] = -1
        tables = self._tables.reshape(self.bucket.num_rows, -1)
        for i, row in enumerate(rows):
            self._ids[i], self._positions[i] = row.token_id, row.position
            table = row.block_table[: tables.shape[1]]
            tables[i, : len(table)] = table
        self.sampling.write([(row.sample, row.position + 1) for row in rows])
        self._tray.send()


class PromptStep:
    """All prompt rows of one step, one after the other."""

    def __init__(
        self,
        runs: Sequence[tuple[Sequence[int], int, Sequence[BlockId]]],
        sampled: Sequence[tuple[int, SamplingParams | None, int]],
        *,
        block_size: int,
        device: torch.device,
    ) -> None:
        """Each of `runs` is token ids, the first's position, and a block table. Each of `sampled`
        is a row, how its next token is chosen, and that token's position.
        """
        ends = np.cumsum([0, *(len(ids) for ids, _, _ in runs)]).tolist()
        width = table_width(max(start + len(ids) for ids, start, _ in runs), block_size)
        cut = query_tiles(
            [
                (i, first, last - first, run[1])
                for i, (run, (first, last)) in enumerate(zip(runs, pairwise(ends), strict=True))
            ]
        )
        num_rows = ends[-1]
        sizes = (*[num_rows] * 3, len(runs) * width, *[len(cut)] * 4, len(sampled))
        first_choice = _num_words(sizes)
        self._tray = Tray(first_choice + ChoiceTray.num_words(len(sampled)), device)
        ids, positions, of_table, tables, *tiles, last = _parts(self._tray.host.numpy(), sizes)
        for i, ((token_ids, start, table), (first, end)) in enumerate(
            zip(runs, pairwise(ends), strict=True)
        ):
            ids[first:end] = token_ids
            positions[first:end] = range(start, start + len(token_ids))
            of_table[first:end] = i
            known = table[:width]
            tables[i * width : i * width + len(known)] = known
        for words, column in zip(tiles, zip(*cut, strict=True), strict=True):
            words[:] = column
        last[:] = [row for row, _, _ in sampled]
        there = _split(self._tray.there, sizes)
        self.rows = PlacedRows(
            token_ids=there[0],
            positions=there[1],
            row_tables=there[2],
            block_tables=there[3].view(len(runs), width),
        )
        self.tiles = QueryTiles(*there[4:8])
        self.last_rows = there[8]
        self.sampling = ChoiceTray(len(sampled), self._tray, first_choice, device)
        self.sampling.write([(params, position) for _, params, position in sampled])
        self._tray.send()


Words = npt.NDArray[np.int32]


def _parts(words: Words, sizes: Sequence[int]) -> list[Words]:
    return [words[first:last] for first, last in _bounds(sizes)]


def _split(words: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    return [words[first:last] for first, last in _bounds(sizes)]


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open, each beginning where alignment has it."""
    starts = accumulate((_rounded_up(size, WORDS_ALIGNED) for size in sizes), initial=0)
    return [(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def _num_words(sizes: Sequence[int]) -> int:
    return sum(_rounded_up(size, WORDS_ALIGNED) for size in sizes)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
