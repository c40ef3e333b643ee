"""How ledgers look, whatever is or is not in them."""

from dataclasses import replace

from rich.console import Console

from kvrelay.cli import render
from kvrelay.obs.ledger import Ledger

WIDTH = 100

LEDGER = Ledger(
    request_id="0" * 32,
    outcome="length",
    ttft_s=0.1,
    ttft_stages={"tokenize": 0.025, "prefill": 0.075},
    gap1_s=0.04,
    gap1_stages={"transfer": 0.01, "first_step": 0.03},
    e2e_s=1.0,
    tpot_s=0.03,
    handoff_tax_s=0.01,
    attempts=2,
    lost_attempts=("PEER_UNAVAILABLE",),
    prefill_worker="prefill-0",
    decode_worker="decode-1",
    route_reason="disaggregated",
    transport="shm",
    handoff_num_bytes=2_000_000,
    overlapped_num_bytes=1_000_000,
    prompt_tokens=5,
    completion_tokens=9,
    cached_prompt_tokens=0,
)


def drawn(ledger: Ledger) -> list[str]:
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(render.ledger(ledger))
    return capture.get().splitlines()


def row(lines: list[str], stage: str) -> str:
    return next(line for line in lines if line.strip().startswith(stage))


def test_bars_are_as_long_as_their_share():
    """
    Three times the time, three times the bar, and the shares are written out.
    """
    lines = drawn(LEDGER)

    assert row(lines, "prefill").count("█") == 3 * row(lines, "tokenize").count("█")
    assert "75%" in row(lines, "prefill")


def test_everything_that_explains_a_request_is_said():
    """
    Who computed it, what was moved, and what went wrong on the way.
    """
    text = "\n".join(drawn(LEDGER))

    for part in ("prefill-0 → decode-1", "2.00 MB by shm", "handoff tax: 10.0 ms"):
        assert part in text
    assert "PEER_UNAVAILABLE" in text


def test_a_request_without_handoff_or_token_can_be_drawn():
    """
    What is not there is not shown, and nothing is divided by zero.
    """
    failed = replace(
        LEDGER, outcome="NO_WORKER", ttft_s=0.0, ttft_stages={"tokenize": 0.0}, gap1_s=0.0,
        gap1_stages={}, tpot_s=0.0, handoff_tax_s=None, lost_attempts=(), decode_worker="",
        transport="",
    )  # fmt: skip
    text = "\n".join(drawn(failed))

    assert "NO_WORKER" in text
    assert "second token" not in text
    assert "handoff" not in text
