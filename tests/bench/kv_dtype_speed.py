"""How long a step of generated tokens takes with KV of each dtype, in turn, so that what else
the machine does is felt by all alike."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kvrelay.engine.batch import Path as NumericPath
from kvrelay.engine.batch import Rows
from kvrelay.kv.cache import KvCache
from kvrelay.model.load import ModelRunner, layout_of, load_runner
from kvrelay.model.spec import read_spec
from kvrelay.types import BlockId, SamplingParams

DTYPES = ("bfloat16", "fp8", "int8")
BLOCK_SIZE = 16
NUM_ROUNDS = 9
STEPS_OF_ROUND = 4
CASES = ((1, 200), (1, 1500), (16, 200), (16, 1500))
PROMPT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    kv_dtype: str
    batch: int
    """Sequences that generate; 0: a prompt."""

    context_tokens: int
    step_s: float
    """Median."""


def measured(model_dir: Path, *, num_threads: int) -> list[Speed]:
    spec = read_spec(model_dir)
    most_tokens = max(batch * (context + BLOCK_SIZE) for batch, context in CASES)
    with ExitStack() as stack:
        runners: dict[str, ModelRunner] = {}
        for kv_dtype in DTYPES:
            layout = layout_of(spec, dtype=kv_dtype, block_size=BLOCK_SIZE)
            cache = KvCache(layout, layout.num_blocks_for(most_tokens), shareable=False)
            stack.enter_context(closing(cache))
            cache.populate()
            runners[kv_dtype], _ = load_runner(
                model_dir,
                spec,
                cache,
                engine="native",
                generation_weights="auto",
                num_threads=num_threads,
                dtype="bfloat16",
            )
        found = [
            speed
            for batch, context in CASES
            for speed in _of(runners, _generated(batch, context), batch=batch, context=context)
        ]
        return found + _of(runners, [_prompt()], batch=0, context=PROMPT_TOKENS)


def _of(
    runners: dict[str, ModelRunner], rows: list[Rows], *, batch: int, context: int
) -> list[Speed]:
    times: dict[str, list[float]] = {kv_dtype: [] for kv_dtype in runners}
    steps = STEPS_OF_ROUND if batch else 1
    for turn in range(NUM_ROUNDS + 1):
        for kv_dtype, runner in runners.items():
            for _ in range(steps):
                began_s = time.perf_counter()
                runner.step(rows)
                if turn > 0:  # the first finds caches and memory cold
                    times[kv_dtype].append(time.perf_counter() - began_s)
    return [
        Speed(kv_dtype=kv_dtype, batch=batch, context_tokens=context, step_s=median(each))
        for kv_dtype, each in times.items()
    ]


def _generated(batch: int, context: int) -> list[Rows]:
    num_blocks = context // BLOCK_SIZE + 1
    return [
        Rows(
            path=NumericPath.GENERATION,
            token_ids=(100 + i,),
            start=context,
            block_table=[BlockId(i * num_blocks + block) for block in range(num_blocks)],
            sample=SamplingParams(),
        )
        for i in range(batch)
    ]


def _prompt() -> Rows:
    return Rows(
        path=NumericPath.PROMPT,
        token_ids=tuple(range(100, 100 + PROMPT_TOKENS)),
        start=0,
        block_table=[BlockId(i) for i in range(PROMPT_TOKENS // BLOCK_SIZE)],
        sample=SamplingParams(),
    )
