"""`python -m kvrelay.bench.control`: measure the coordinator alone, and say what came out."""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields

from kvrelay.bench import machine
from kvrelay.bench.control.measure import Options, Result, Round, measure
from kvrelay.errors import ModelInvalid, ServingError


def main() -> None:
    """Measure with the options of the command line. Exits 1 if an answer was wrong,
    or a figure cannot be true.
    """
    options, as_json = _options()
    try:
        result = asyncio.run(measure(options, on_round=lambda it: _say(_line(it))))
    except (ServingError, ModelInvalid) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    if as_json:
        sys.stdout.write(json.dumps(_record(options, result), indent=1) + "\n")
    else:
        sys.stdout.write(_summary(options, result))
    impossible = [it for it in result.rounds if result.is_pinned and not it.fits_one_core]
    if impossible:
        sys.stderr.write(f"error: {len(impossible)} rounds show more CPU time than one core has\n")
    if result.num_wrong or impossible:
        raise SystemExit(1)


def _options() -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        prog="python -m kvrelay.bench.control",
        description="Tokens per second through one coordinator process on one core, "
        "from scripted workers to callers.",
    )
    default = {field.name: field.default for field in fields(Options)}
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--callers", type=int, default=default["num_callers"])
    parser.add_argument("--tokens", type=int, default=default["num_tokens"], help="per answer")
    parser.add_argument("--rounds", type=int, default=default["num_rounds"])
    parser.add_argument("--round-s", type=float, default=default["round_s"])
    parser.add_argument("--warm-up", type=int, default=default["warm_up"], help="tokens per caller")
    parser.add_argument(
        "--step-s", type=float, default=default["step_s"], help="pause after each decode step"
    )
    parser.add_argument("--share-connection", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if min(given.callers, given.rounds, given.warm_up) < 1 or given.tokens <= given.warm_up:
        parser.error("--callers, --rounds and --warm-up: at least 1; --tokens: more than --warm-up")
    options = Options(
        model=given.model,
        num_callers=given.callers,
        num_tokens=given.tokens,
        num_rounds=given.rounds,
        round_s=given.round_s,
        warm_up=given.warm_up,
        step_s=given.step_s,
        share_connection=given.share_connection,
    )
    return options, given.json


def _line(it: Round) -> str:
    per_cpu_s = "?" if it.tokens_per_cpu_s is None else f"{it.tokens_per_cpu_s:,.0f}"
    return (
        f"{it.elapsed_s:.1f} s: {it.tokens_per_s:,.0f} tokens/s, "
        f"{per_cpu_s} per CPU second of the coordinator, "
        f"{it.num_tokens / max(1, it.num_messages):.1f} tokens a message, "
        f"CPU {_share(it.coordinator_cpu_s, it)} coordinator, {_share(it.others_cpu_s, it)} others"
    )


def _share(cpu_s: float | None, it: Round) -> str:
    return "?" if cpu_s is None else f"{cpu_s / it.elapsed_s:.0%}"


def _summary(options: Options, result: Result) -> str:
    wall = result.median(lambda it: it.tokens_per_s)
    per_cpu_s = result.median(lambda it: it.tokens_per_cpu_s)
    connections = 1 if options.share_connection else options.num_callers
    pinned = (
        "not pinned"
        if result.coordinator_core is None
        else f"coordinator on core {result.coordinator_core}, others on {result.other_cores}"
    )
    rates = [f"{wall:,.0f} tokens/s by the wall clock"]
    if per_cpu_s is not None:
        rates.append(f"{per_cpu_s:,.0f} tokens per CPU second of the coordinator")
    return (
        f"{options.num_callers} callers over {connections} connections, {pinned}\n"
        f"median of {len(result.rounds)} rounds: {'; '.join(rates)}\n"
        f"{result.num_answers} whole answers checked, {result.num_wrong} of them wrong\n"
    )


def _record(options: Options, result: Result) -> dict[str, object]:
    return {
        "machine": machine.describe(),
        "options": asdict(options),
        "rounds": [asdict(it) for it in result.rounds],
        "num_answers": result.num_answers,
        "num_wrong": result.num_wrong,
        "tokens_per_s": result.median(lambda it: it.tokens_per_s),
        "tokens_per_coordinator_cpu_s": result.median(lambda it: it.tokens_per_cpu_s),
    }


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
