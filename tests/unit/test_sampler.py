"""How the next token is drawn: from the right set, at the right rate, by nothing but its key."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.model.sampler import draw, kept_tokens, pick, sample
from kvrelay.types import SamplingParams

NUM_DRAWS = 20_000


def logits_of(seed: int, *, num_rows: int = 1, vocab_size: int = 50) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> np.ndarray:
    """Tokens of many positions with the same logits."""
    tokens = sample(logits.expand(num_draws, -1), [params] * num_draws, range(num_draws))
    return np.bincount(tokens, minlength=logits.shape[-1])


def kept_weights(logits: npt.NDArray[np.floating], params: SamplingParams) -> np.ndarray:
    """Of the whole vocabulary; 0 where a token was cut."""
    ids, weights = kept_tokens(logits, params)
    assert (np.diff(ids) > 0).all()
    whole = np.zeros(len(logits))
    whole[ids] = weights
    return whole


def slowly_kept(logits: npt.NDArray[np.floating], params: SamplingParams) -> np.ndarray:
    """What `kept_weights` must be, by sorting everything."""
    with np.errstate(all="ignore"):
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / params.temperature)
    if 0 < params.top_k < len(logits):
        weights[logits < np.sort(logits)[-params.top_k]] = 0.0
    if params.top_p < 1.0:
        likeliest = np.sort(weights)[::-1]
        reached = np.flatnonzero(np.cumsum(likeliest) >= params.top_p * weights.sum())
        if len(reached):
            weights[weights < likeliest[reached[0]]] = 0.0
    weights[weights < params.min_p] = 0.0
    return weights


def random_logits(seed: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """Of any spread, with many ties now and then, or far apart."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal(vocab_size) * 10 ** generator.uniform(-2, 2)
    logits[: vocab_size // 100] += generator.uniform(0, 20)
    if seed % 3 == 0:
        logits = np.round(logits)
    if seed % 7 == 0:
        logits *= 1e30
    return logits.astype(np.float32)


@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 2, 50, 3000, 20_000]),
    temperature=st.sampled_from([1e-300, 1e-35, 1e-3, 0.2, 0.7, 1.0, 2.5, 1e9, 1e300]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 5000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12]),
    min_p=st.sampled_from([0.0, 0.0, 1e-12, 0.05, 0.99]),
)
def test_what_is_kept_is_what_sorting_everything_keeps(
    seed: int, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Candidates and bounds save work; they never change a cut or a weight."""
    logits = random_logits(seed, vocab_size)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert np.array_equal(kept_weights(logits, params), slowly_kept(logits, params))


@pytest.mark.parametrize("spread", [1e-3, 0.5])
def test_a_cut_that_bounds_do_not_settle_is_still_exact(spread: float) -> None:
    """Of 30 000 tokens about equally likely, each is less than the bounds leave open."""
    generator = np.random.default_rng(1)
    logits = (generator.standard_normal(30_000) * spread).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    assert np.array_equal(kept_weights(logits, params), slowly_kept(logits, params))


def test_equals_of_the_last_one_kept_are_kept() -> None:
    """However many there are, and wherever: by top-k and by top-p."""
    logits = np.zeros(5000, dtype=np.float32)
    logits[::7] = 1.0
    for params in (
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=0.01, top_p=0.9),
    ):
        assert np.array_equal(np.flatnonzero(kept_weights(logits, params)), np.arange(0, 5000, 7))


@given(seed=st.integers(0, 10_000), uniform=st.floats(0, 1 - 2**-52))
def test_a_draw_takes_the_token_at_which_the_running_sum_passes_it(
    seed: int, uniform: float
) -> None:
    """Also where the sums are taken in pieces; never a token without weight."""
    generator = np.random.default_rng(seed)
    weights = generator.random(5000) * (generator.random(5000) < 0.1)
    weights[-3:] = 0.0
    index = pick(weights, uniform)
    passed, wanted = weights[: index + 1].sum(), uniform * weights.sum()
    assert weights[index] > 0
    assert passed > wanted - 1e-9
    assert passed - weights[index] <= wanted + 1e-9
    assert pick(weights, 1 - 2**-52) == np.flatnonzero(weights)[-1]


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
    logits = logits_of(8, num_rows=9, vocab_size=4000)
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
