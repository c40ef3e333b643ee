"""Mixes, arrivals, traces and prompts: all of them functions of a seed."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.bench.workload import (
    TRACE_BLOCK_TOKENS,
    Item,
    Mix,
    Prompts,
    Shape,
    mixed,
    parse_mix,
    parse_trace,
    poisson,
    stretched,
    until,
)
from kvrelay.errors import InvalidRequest

seeds = st.integers(0, 2**64 - 1)


def line(timestamp=0, input_length=600, output_length=5, hash_ids=(1, 2), **more):
    fields = {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": list(hash_ids),
    }
    return json.dumps(fields | more)


def prompts(seed=0, run="0", vocab_size=1000):
    return Prompts(make_rng=random.Random, seed=seed, run=run, vocab_size=vocab_size)


def test_a_mix_is_read_as_it_is_written():
    """A weight that is not given is 1."""
    mix = parse_mix("100:64:0.7, 1400:16")

    assert mix == Mix((Shape(100, 64), Shape(1400, 16)), (0.7, 1.0))
    assert parse_mix(str(mix)) == mix
    assert mix.longest_tokens == 1416


@pytest.mark.parametrize(
    "text",
    ["", "100", "1:2:3:4", "a:1", "0:5", "5:0", "-1:5", "1:1:0", "1:1:inf", "1:1:nan", "1:1,"],
)
def test_what_is_no_mix_is_refused(text):
    """Naming the part that is wrong."""
    with pytest.raises(InvalidRequest, match="mix"):
        parse_mix(text)


def test_shapes_occur_as_often_as_their_weights_say():
    """Within what chance allows."""
    items = itertools.islice(mixed(parse_mix("1:1:0.7,2:2:0.3"), random.Random, seed=1), 4000)
    share = sum(item.shape.prompt_tokens == 2 for item in items) / 4000

    assert share == pytest.approx(0.3, abs=0.03)


@given(seeds, st.integers(1, 5))
def test_one_seed_is_one_workload(seed, num_shapes):
    """Whatever the rate, shapes come in the same order and in the same rhythm."""
    mix = Mix(tuple(Shape(i + 1, 1) for i in range(num_shapes)), (1.0,) * num_shapes)

    def work(rate):
        items = itertools.islice(mixed(mix, random.Random, seed=seed), 20)
        return list(poisson(items, rate, random.Random, seed=seed))

    slow, fast = work(1.0), work(4.0)
    assert slow == work(1.0)
    assert [item.shape for item in slow] == [item.shape for item in fast]
    assert [item.at_s / 4 for item in slow] == pytest.approx([item.at_s for item in fast])


@given(seeds, st.floats(0.01, 1e4))
def test_arrivals_begin_at_once_and_never_go_back(seed, rate):
    """And they end where they are told to."""
    items = [Item(Shape(1, 1))] * 50
    due_s = [item.at_s for item in poisson(items, rate, random.Random, seed=seed)]

    assert due_s[0] == 0
    assert due_s == sorted(due_s)
    limit_s = due_s[-1] / 2 + 1e-9
    kept = list(until(poisson(items, rate, random.Random, seed=seed), limit_s))
    assert [item.at_s for item in kept] == [at_s for at_s in due_s if at_s < limit_s]


def test_arrivals_come_at_the_mean_rate():
    """With the spread of a Poisson process: standard deviation and mean are alike."""
    items = itertools.repeat(Item(Shape(1, 1)), 4001)
    due_s = [item.at_s for item in poisson(items, 5.0, random.Random, seed=3)]
    gaps_s = [b - a for a, b in itertools.pairwise(due_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    deviation_s = (sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)) ** 0.5

    assert mean_s == pytest.approx(0.2, rel=0.05)
    assert deviation_s == pytest.approx(0.2, rel=0.08)


def test_a_trace_is_put_in_order_and_begins_at_zero():
    """Timestamps are milliseconds; other fields and empty lines do not matter."""
    items = parse_trace([line(5000, 512, hash_ids=[7]), "\n", line(2500, kind="chat")])

    assert items == [
        Item(Shape(600, 5), 0.0, (1, 2)),
        Item(Shape(512, 5), 2.5, (7,)),
    ]


def test_a_trace_without_hashes_has_prompts_of_its_own():
    """They are then made like those of a mix."""
    (item,) = parse_trace([json.dumps({"timestamp": 0, "input_length": 9, "output_length": 1})])

    assert item.hash_ids == ()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (line(timestamp="x"), "timestamp"),
        (line(timestamp=True), "timestamp"),
        (line(timestamp=float("inf")), "finite"),
        (line(input_length=0), "input_length"),
        (line(output_length=1.5), "output_length"),
        (line(hash_ids=["a", "b"]), "hash_ids"),
        (line(hash_ids=[1]), "1 hash_ids for 600 tokens, want 2"),
    ],
)
def test_a_line_that_is_no_request_is_refused_by_its_number(text, named):
    """Nothing is skipped in silence."""
    with pytest.raises(InvalidRequest, match=f"line 2.*{named}"):
        parse_trace([line(), text])


def test_an_empty_trace_is_refused():
    """There would be nothing to measure."""
    with pytest.raises(InvalidRequest, match="no requests"):
        parse_trace(["\n"])


def test_a_stretched_trace_keeps_its_rhythm():
    """Only the mean rate is another."""
    items = parse_trace([line(0), line(1000), line(4000)])

    assert [item.at_s for item in stretched(items, 1.0)] == [0.0, 0.5, 2.0]
    assert stretched(items[:1], 1.0) == items[:1]


@given(seeds, st.integers(1, 2000), st.integers(1, 200_000))
def test_prompts_have_their_length_and_stay_within_the_vocabulary(seed, num_tokens, vocab_size):
    """And they are the same each time."""
    item = Item(Shape(num_tokens, 1))
    token_ids = prompts(seed, vocab_size=vocab_size).token_ids(3, item)

    assert len(token_ids) == num_tokens
    assert all(0 <= token_id < vocab_size for token_id in token_ids)
    assert prompts(seed, vocab_size=vocab_size).token_ids(3, item) == token_ids


def test_no_two_prompts_of_a_mix_begin_alike():
    """Neither within a run nor in two runs, so no prefix cache helps."""
    item = Item(Shape(16, 1))
    begins = {
        tuple(prompts(seed, run).token_ids(index, item)[:4])
        for seed, run, index in itertools.product(range(3), ("0", "1", "warm-up"), range(20))
    }

    assert len(begins) == 180


def test_equal_hashes_of_a_trace_are_equal_blocks():
    """So prompts share what they shared where the trace was taken; other runs share nothing."""
    first = prompts().token_ids(0, Item(Shape(1500, 1), 0.0, (1, 2, 3)))
    second = prompts().token_ids(1, Item(Shape(1100, 1), 0.0, (1, 2, 9)))
    shared = 2 * TRACE_BLOCK_TOKENS

    assert (len(first), len(second)) == (1500, 1100)
    assert first[:shared] == second[:shared]
    assert first[shared : shared + 8] != second[shared : shared + 8]
    assert prompts(run="1").token_ids(0, Item(Shape(8, 1), 0.0, (1,))) != first[:8]
