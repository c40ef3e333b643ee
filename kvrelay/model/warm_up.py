"""Tiny steps through both numeric paths, so that the first request finds code and memory warm."""

from collections.abc import Iterator

from kvrelay.engine.batch import Path, Rows
from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId, SamplingParams

WARM_UP_ROWS = 64


def warm_up_steps(
    layout: KvLayout, *, num_rows: int, num_blocks: int, num_positions: int, vocab_size: int
) -> Iterator[Rows]:
    """A prompt and then a generated token, `num_rows` in all, over the first blocks of a cache."""
    num_blocks = min(layout.num_blocks_for(num_rows), num_blocks)
    num_prompt = min(num_rows, num_blocks * layout.block_size, num_positions) - 1
    table = [BlockId(i) for i in range(num_blocks)]
    params = SamplingParams(temperature=1.0)

    def rows(path: Path, token_ids: tuple[int, ...], start: int) -> Rows:
        return Rows(path=path, token_ids=token_ids, start=start, block_table=table, sample=params)

    if num_prompt > 0:
        yield rows(Path.PROMPT, tuple(i % vocab_size for i in range(num_prompt)), 0)
    yield rows(Path.GENERATION, (0,), num_prompt)
