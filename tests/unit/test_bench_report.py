"""What is said of a run, and how it is planned."""

import json
import random
import sys

import pytest

from kvrelay.bench import machine, plot, report
from kvrelay.bench.base import Handoff, Record, Served
from kvrelay.bench.plan import DEFAULT_REQUESTS, Plan, Run
from kvrelay.bench.stats import Targets, total
from kvrelay.bench.workload import Item, Shape, parse_mix
from kvrelay.config import SettingsError
from kvrelay.errors import InvalidRequest

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)


def plan(**given):
    fields = {
        "rates": (),
        "num_clients": 2,
        "num_requests": None,
        "duration_s": None,
        "mix": parse_mix("10:4"),
        "trace": (),
        "seed": 1,
        "temperature": 0.0,
        "targets": TARGETS,
        "num_warm_up": 0,
        "timeout_s": 9.0,
    }
    return Plan(**(fields | given))


def record(index=0, *, scheduled_s=0.0, sent_s=0.0, error="", output_tokens=3, handoff=None):
    return Record(
        index=index,
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        ended_s=2.0,
        prompt_tokens=10,
        max_tokens=3,
        token_at_s=(0.5, 0.6, 0.65),
        output_tokens=output_tokens,
        error=error,
        handoff=handoff,
    )


HANDED = Handoff(
    tax_s=0.03,
    stages={"pull_wait": 0.01, "transfer": 0.02},
    transport="shm",
    num_bytes=4_000_000,
    overlapped_num_bytes=3_000_000,
)


def run(*records, rate=2.0, cpu=0.1):
    totals = total(records, TARGETS, is_open_loop=rate is not None)
    return Run(rate=rate, records=records, totals=totals, generator_cpu_share=cpu)


def all_items(plan_, rate):
    return list(plan_.items(rate, random.Random))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 ms"),
        (0.000_42, "0.42 ms"),
        (-0.003, "-3.00 ms"),
        (0.012_34, "12.3 ms"),
        (0.099_96, "100 ms"),
        (0.123_4, "123 ms"),
        (0.9996, "1.00 s"),
        (12.34, "12.3 s"),
    ],
)
def test_durations_have_three_digits_and_a_unit(seconds, text):
    """Whatever their size."""
    assert report.duration(seconds) == text


def test_goodput_is_never_told_without_its_targets():
    """Nor without the share of requests that met them."""
    (said,) = [line for line in report.facts(run(record(), record(1)), TARGETS) if "good" in line]

    assert said == "goodput 1.00 requests/s: 100% met TTFT ≤ 1.00 s and TPOT ≤ 100 ms"


def test_each_measure_is_a_row_of_percentiles():
    """What was not measured has none."""
    rows = report.rows(run(record()).totals)

    assert [row[0] for row in rows] == ["TTFT", "gap 1", "ITL", "TPOT", "max stall", "E2E"]
    assert ("TTFT", *["500 ms"] * 4) in rows
    assert {len(row) for row in rows} == {len(report.HEADINGS)}


def test_the_handoff_tax_is_told_in_all_its_units():
    """As time, against TTFT and in decode steps; with what moved and where its time went."""
    handed = run(record(handoff=HANDED))

    assert ("handoff tax", *["30.0 ms"] * 4) in report.rows(handed.totals)
    assert ("  of TTFT", *["6.0%"] * 4) in report.rows(handed.totals)
    assert ("  in steps", *["0.40"] * 4) in report.rows(handed.totals)
    facts = report.facts(handed, TARGETS)
    assert "handoffs by transport: shm 1; 4.0 MB of KV moved, 75% of it while prefilling" in facts
    assert "gap 1 by stage, p50: pull_wait 10.0 ms, transfer 20.0 ms" in facts


def test_an_honest_run_has_no_warning():
    """So that a warning is read."""
    assert report.warnings(run(record())) == []


@pytest.mark.parametrize(
    ("doubtful", "said"),
    [
        (run(record(), record(1, error="QUEUE_FULL")), "1 request failed: QUEUE_FULL 1"),
        (run(record(output_tokens=2)), "1 answer shorter than asked for"),
        (run(record(sent_s=0.2)), "the generator fell behind: lag p99 200 ms is over 10.0 ms"),
        (run(record(), record(1, scheduled_s=0.25, sent_s=0.25)), "4.00 requests/s came where 2"),
        (run(record(), cpu=0.95), "the generator used 95% of a core"),
    ],
)
def test_what_makes_a_run_doubtful_is_said(doubtful, said):
    """In a line of its own."""
    (warning,) = report.warnings(doubtful)

    assert warning.startswith(said)


def test_a_sweep_has_a_row_for_each_rate():
    """Also where nothing finished."""
    rows = report.sweep([run(record()), run(record(error="X"), rate=4.0)])

    assert [row[:3] for row in rows] == [("2 /s", "0", "500 ms"), ("4 /s", "1", "–")]
    assert {len(row) for row in rows} == {len(report.SWEEP_HEADINGS)}


def test_the_title_says_how_requests_came():
    """Closed, at a rate, or as in a trace."""
    open_ = plan(rates=(2.0,))

    assert report.title(run(record(), rate=None), plan()).startswith("closed loop, 2 clients: 1 of")
    assert report.title(run(record()), open_).startswith("open loop, 2 requests/s: 1 of 1 request ")
    assert "trace's own" in report.title(run(record(), rate=None), plan(rates=(None,)))


def test_json_has_every_number_and_the_machine():
    """And it is JSON that any parser reads."""
    made = report.to_json(
        [run(record())],
        plan(rates=(2.0,)),
        Served(model="m", context_tokens=None, vocab_size=None),
        protocol="gRPC",
        address="h:1",
        vocab_size=7,
        command=["kvrelay", "bench"],
        machine=machine.describe(),
    )
    back = json.loads(json.dumps(made, allow_nan=False))
    (found,) = back["runs"]

    assert (back["seed"], back["targets"]) == (1, {"ttft_s": 1.0, "tpot_s": 0.1})
    assert found["requests"][0]["token_at_s"] == [0.5, 0.6, 0.65]
    assert found["requests"][0]["ttft_s"] == 0.5
    assert found["totals"]["measures"]["ttft_s"]["p99"] == 0.5
    assert back["machine"]["cores"] >= 1
    assert back["machine"]["memory_num_bytes"] > 1 << 28
    assert back["machine"]["python"].startswith("3.")


def test_a_plan_without_limits_has_a_small_one():
    """A trace is taken whole, a duration is a limit of its own."""
    trace = tuple(Item(Shape(1, 1), float(at_s)) for at_s in range(100))

    assert len(all_items(plan(), None)) == DEFAULT_REQUESTS
    assert len(all_items(plan(num_requests=3), None)) == 3
    assert plan(duration_s=9.0).limit is None
    assert all_items(plan(trace=trace, rates=(None,)), None) == list(trace)
    assert len(all_items(plan(trace=trace, rates=(None,), duration_s=9.5), None)) == 10
    assert len(all_items(plan(trace=trace, rates=(2.0,), duration_s=9.5), 2.0)) == 19


def test_an_open_loop_of_a_duration_ends_with_it():
    """The number of requests follows from the rate."""
    items = all_items(plan(rates=(50.0,), duration_s=10.0), 50.0)

    assert items[-1].at_s < 10.0
    assert len(items) == pytest.approx(500, rel=0.15)


def test_a_mix_that_cannot_be_served_is_refused_at_once():
    """If the server says what it can."""
    served = Served(model="m", context_tokens=13, vocab_size=None)
    with pytest.raises(InvalidRequest, match="14 tokens of prompt and output, the context has 13"):
        plan().check(served)
    plan(trace=(Item(Shape(99, 1)),)).check(served)
    plan().check(Served(model="m", context_tokens=None, vocab_size=None))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Drawn before the test, since matplotlib keeps the fonts open that it has read."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = tmp_path_factory.mktemp("plot") / "goodput.png"
    plot.draw([run(record()), run(record(error="X"), rate=4.0)], TARGETS, title="t", path=path)
    return path


def test_a_picture_is_drawn(picture):
    """Also where nothing finished at some rate."""
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_its_extra_a_picture_is_refused(monkeypatch):
    """With what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(SettingsError, match=r"pip install 'kvrelay\[plot\]'"):
        plot.require()
