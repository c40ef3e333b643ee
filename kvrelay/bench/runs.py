"""A benchmark: warm-up, then one run for each rate, each with prompts of its own."""

import itertools
from collections.abc import Callable
from typing import Protocol

from kvrelay.bench.base import Ask, Record, Source
from kvrelay.bench.driver import Driver, Timeline
from kvrelay.bench.plan import Plan, Run
from kvrelay.bench.stats import total
from kvrelay.bench.workload import Item, MakeRng, Prompts
from kvrelay.clock import Clock
from kvrelay.errors import InvalidRequest


class Watcher(Protocol):
    """Whoever wants to see a benchmark going on."""

    def begin(self, title: str, num_requests: int | None) -> None: ...

    def took(self, record: Record) -> None: ...


async def carry_out(
    plan: Plan,
    source: Source,
    *,
    vocab_size: int,
    timeline: Timeline,
    cpu_clock: Clock,
    make_rng: MakeRng,
    watcher: Watcher,
) -> list[Run]:
    """All runs of a plan, one after another, each when nothing of the last is under way."""

    def driver(run: str) -> Driver:
        prompts = Prompts(make_rng=make_rng, seed=plan.seed, run=run, vocab_size=vocab_size)
        return Driver(
            source,
            timeline,
            make_ask=_asking(plan, prompts),
            on_record=watcher.took,
            timeout_s=plan.timeout_s,
        )

    if plan.num_warm_up:
        watcher.begin("warm-up", plan.num_warm_up)
        items = itertools.islice(itertools.cycle(_some(plan, make_rng)), plan.num_warm_up)
        await driver("warm-up").closed_loop(items, num_clients=plan.num_clients)
    runs = []
    for number, rate in enumerate(plan.rates or (None,)):
        began_cpu_s, began_s = cpu_clock.now(), timeline.now()
        records = await _run(plan, rate, driver(str(number)), make_rng, watcher)
        if not records:
            raise InvalidRequest("duration_s", "no request was due within it")
        cpu_s, elapsed_s = cpu_clock.now() - began_cpu_s, timeline.now() - began_s
        runs.append(
            Run(
                rate=rate,
                records=tuple(records),
                totals=total(records, plan.targets, is_open_loop=plan.is_open_loop),
                generator_cpu_share=cpu_s / elapsed_s if elapsed_s > 0 else 0.0,
            )
        )
    return runs


async def _run(
    plan: Plan, rate: float | None, driver: Driver, make_rng: MakeRng, watcher: Watcher
) -> list[Record]:
    items = plan.items(rate, make_rng)
    if plan.is_open_loop:
        due = list(items)
        watcher.begin("trace" if rate is None else f"{rate:g} requests/s", len(due))
        return await driver.open_loop(due)
    watcher.begin(f"{plan.num_clients} clients", plan.limit if plan.duration_s is None else None)
    duration_s = float("inf") if plan.duration_s is None else plan.duration_s
    return await driver.closed_loop(items, num_clients=plan.num_clients, duration_s=duration_s)


def _some(plan: Plan, make_rng: MakeRng) -> list[Item]:
    """Shapes to warm up with: those of the first requests."""
    rate = plan.rates[0] if plan.rates else None
    return list(itertools.islice(plan.items(rate, make_rng), plan.num_warm_up))


def _asking(plan: Plan, prompts: Prompts) -> Callable[[int, Item], Ask]:
    def make_ask(index: int, item: Item) -> Ask:
        return Ask(
            token_ids=prompts.token_ids(index, item),
            max_tokens=item.shape.output_tokens,
            temperature=plan.temperature,
            seed=index,
        )

    return make_ask
