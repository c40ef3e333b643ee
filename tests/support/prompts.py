"""Prompts of real text, cut to lengths that cross every edge worth crossing."""

import random
from pathlib import Path
from pydoc_data import topics

from coordinator.tokenizer import Tokenizer

BLOCK = 16

LENGTHS = sorted(
    {
        *range(1, 6),
        *(n * BLOCK + d for n in (1, 2, 4, 8) for d in (-1, 0, 1)),
        *(n + d for n in (256, 512, 1024) for d in (-1, 0, 1)),
        *(7, 11, 40, 50, 70, 90, 100, 140, 150, 170, 180, 200, 210, 220, 230, 250, 300, 333),
        *(400, 450, 600, 700, 800, 1100, 1300, 1500),
    }
)
"""1 to 1500 tokens, on both sides of the edges of blocks and chunks."""


def prompts(model_dir: Path) -> list[tuple[int, ...]]:
    """One prompt of each length, cut from different places of Python's own help texts."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    token_ids = Tokenizer(model_dir).encode(text, add_special_tokens=False)
    starts = random.Random(20).sample(range(len(token_ids) - max(LENGTHS)), len(LENGTHS))
    return [tuple(token_ids[s : s + n]) for s, n in zip(starts, LENGTHS, strict=True)]
