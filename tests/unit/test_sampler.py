"""How the next token is drawn: from the right set, at the right rate, by nothing but its key."""

import numpy as np
import pytest
import torch

from kvrelay.model.sampler import draw, kept_weights, sample
from kvrelay.types import SamplingParams

NUM_DRAWS = 20_000


def logits_of(seed: int, *, num_rows: int = 1, vocab_size: int = 50) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> np.ndarray:
    """Tokens of many positions with the same logits."""
    tokens = sample(logits.expand(num_draws, -1), [params] * num_draws, range(num_draws))
    return np.bincount(tokens, minlength=logits.shape[-1])


def test_greedy_takes_the_likeliest_and_the_lowest_id_of_equals() -> None:
    """Temperature 0 draws nothing."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-3.0, -2.0, -1.0, -1.5]])
    assert sample(logits, [SamplingParams()] * 3, [7, 8, 9]) == [1, 0, 2]


def test_nothing_to_sample_is_nothing() -> None:
    """A step of prompt chunks alone samples no row."""
    assert sample(torch.empty(0, 5), [], []) == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    """Chi-square over many positions of one seed stays within six standard deviations."""
    logits = logits_of(3, vocab_size=30)
    counts = drawn(logits, SamplingParams(temperature=temperature, seed=11), NUM_DRAWS)
    expected = torch.softmax(logits[0].double() / temperature, 0).numpy() * NUM_DRAWS
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5, chi_square


@pytest.mark.parametrize("seed", range(5))
def test_top_k_never_leaves_the_k_likeliest(seed: int) -> None:
    """And reaches all of them when they are about equally likely."""
    logits = logits_of(seed) * 0.1
    counts = drawn(logits, SamplingParams(temperature=1.0, top_k=7, seed=seed), 2000)
    assert set(np.flatnonzero(counts)) == set(logits[0].topk(7).indices.tolist())


@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, vocab_size: int) -> None:
    """The set reaches top_p, and would not without its last token."""
    logits = logits_of(5, vocab_size=vocab_size)[0].double().numpy() * (0.1 if top_p > 0.9 else 1)
    everything = kept_weights(logits, SamplingParams(temperature=1.0))
    kept = kept_weights(logits, SamplingParams(temperature=1.0, top_p=top_p))
    share = kept.sum() / everything.sum()
    assert share >= top_p
    assert share - kept[kept > 0].min() / everything.sum() < top_p
    assert everything[kept > 0].min() > everything[kept == 0].max(initial=0)


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    """Exactly the tokens below min_p times the likeliest."""
    logits = logits_of(6)[0].double().numpy()
    everything = kept_weights(logits, SamplingParams(temperature=1.0))
    kept = kept_weights(logits, SamplingParams(temperature=1.0, min_p=0.2))
    assert ((kept > 0) == (everything >= 0.2 * everything.max())).all()


def test_top_p_counts_the_probability_that_top_k_left() -> None:
    """Temperature, top-k, top-p, min-p, in this order."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.6)
    assert list(kept_weights(logits, params) > 0) == [True, True, False, False]
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.55)
    assert list(kept_weights(logits, params) > 0) == [True, False, False, False]


def test_a_row_does_not_depend_on_the_others() -> None:
    """Alone, or among rows of other logits and parameters."""
    logits = logits_of(8, num_rows=9, vocab_size=400)
    params = [
        SamplingParams(temperature=0.3 * (i % 4), top_k=i * 5, top_p=1 - 0.1 * i, seed=i)
        for i in range(9)
    ]
    positions = [i * i for i in range(9)]
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], params[i : i + 1], positions[i : i + 1]) for i in range(9)]
    assert [[token] for token in together] == alone


def test_the_draw_is_fixed_by_seed_and_position() -> None:
    """These values are part of every worker's promise; changing them breaks replays."""
    assert draw(0, 0) == draw(0, 0)
    assert draw(2**64 - 1, 5) == draw(-1, 5)
    draws = {draw(seed, position) for seed in range(100) for position in range(100)}
    assert len(draws) == 100 * 100
    assert min(draws) >= 0
    assert max(draws) < 1


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 1e9])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    """Nearly greedy, or nearly uniform, never an id outside the vocabulary."""
    logits = logits_of(4)
    params = [SamplingParams(temperature=temperature, seed=i) for i in range(50)]
    tokens = sample(logits.expand(50, -1), params, range(50))
    assert all(0 <= token < 50 for token in tokens)
    if temperature < 1:
        assert set(tokens) == {int(logits.argmax())}
