"""What the compiled engine's numerics are called, and what it refuses to read."""

import pytest

from kvrelay.model.generation_weights import Blocks
from kvrelay.native.library import why_not
from tests.support.tiny_model import generated, prompt, runner_of, table, tiny_spec, tiny_weights

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SPEC = tiny_spec(max_position_embeddings=40)


def numerics(seed: int, *, num_threads: int = 1, num_blocks: int = 4, block_size: int = 16) -> str:
    weights = tiny_weights(SPEC, "bfloat16", seed=seed)
    with runner_of(
        SPEC,
        weights,
        blocks=Blocks.none(SPEC),
        num_threads=num_threads,
        num_blocks=num_blocks,
        block_size=block_size,
    ) as (runner, _):
        runner.warm_up()
        assert runner.prove_rows() == ()
        return runner.numerics


def test_the_name_is_of_the_bits_and_of_nothing_else() -> None:
    """Equal for other threads, pools and block sizes, another for other results."""
    assert numerics(1) == numerics(1, num_threads=2) == numerics(1, num_blocks=9, block_size=8)
    assert numerics(1) != numerics(2)
    assert numerics(1).startswith("native-test-v")


def test_what_is_not_the_models_or_the_caches_is_refused() -> None:
    """A token, a position and a block beyond the last, and a table too short for its rows."""
    weights = tiny_weights(SPEC, "bfloat16")
    with runner_of(SPEC, weights, blocks=Blocks.none(SPEC), num_blocks=3) as (runner, _):
        with pytest.raises(RuntimeError, match="token"):
            runner.step([prompt([SPEC.vocab_size], 0, table(0, 1))])
        with pytest.raises(RuntimeError, match="of 40 positions"):
            runner.step([generated([1], 40, table(0, 3))])
        with pytest.raises(AssertionError, match="no such block"):
            runner.step([prompt([1], 0, table(3, 1))])
        with pytest.raises(AssertionError):
            runner.step([prompt([1] * 17, 0, table(0, 1))])
