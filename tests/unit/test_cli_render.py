"""How ledgers look, whatever is or is not in them."""

from dataclasses import replace

from rich.console import Console

from kvrelay.cli import render
from kvrelay.client import Member, Pool
from kvrelay.obs.ledger import Ledger
from kvrelay.types import Role, WorkerLoad
from tests.support.members import FINGERPRINT, LAYOUT, identity

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
    move_gaps_s=(0.0425,),
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

    for part in ("prefill-0 → decode-1", "2.00 MB by shm", "10.0 ms", "a gap of 42.5 ms"):
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


def mixed_pool_text() -> str:
    """Of a prefill worker that keeps bfloat16 and a decode worker that keeps int8."""
    members = tuple(
        Member(
            identity=identity(dtype, fingerprint=replace(FINGERPRINT, layout=layout)),
            load=WorkerLoad(),
            load_age_ms=0,
            placed_sequences=0,
        )
        for dtype in ("int8", "bfloat16")
        for layout in [replace(LAYOUT, dtype=dtype)]
    )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render.pool(pool_of(members), is_wide=False))
    return capture.get()


def pool_of(members: tuple[Member, ...]) -> Pool:
    return Pool(
        members=members,
        is_ready=True,
        not_ready_reason="",
        active_requests=0,
        finished_requests_total=0,
        lost_attempts_total=0,
    )


def pool_lines(*, is_wide: bool) -> list[str]:
    load = WorkerLoad(free_blocks=12345, cached_blocks=12345, handoffs_total=1_000_000)
    members = tuple(
        Member(identity=identity(name, role), load=load, load_age_ms=12_345, placed_sequences=0)
        for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))
    )
    console = Console(width=80 if not is_wide else render.WIDE_COLUMNS)
    with console.capture() as capture:
        console.print(render.pool(pool_of(members), is_wide=is_wide))
    return capture.get().splitlines()


def test_a_worker_is_one_row_in_80_columns():
    """
    Whole, with large numbers; what is left out needs more room.
    """
    narrow, wide = pool_lines(is_wide=False), pool_lines(is_wide=True)

    assert len(narrow) == len(wide) == 5
    assert narrow[2].split()[:3] == wide[2].split()[:3] == ["worker", "role", "pid"]
    assert narrow[-1].split()[2].isdigit()
    assert "12345" in narrow[-1]
    assert "1000000" in narrow[-1]
    assert "12.3 s" in narrow[-1]
    assert "127.0.0.1:1" in wide[-1]


def test_a_pool_that_mixes_kv_dtypes_says_what_it_promises_less():
    """
    One line, and none where all are alike.
    """
    assert "bfloat16, int8: tokens depend on which workers serve" in mixed_pool_text()
    assert "tokens depend" not in "".join(pool_lines(is_wide=False))


def test_a_ledger_fits_80_columns():
    """
    Each stage is one line there.
    """
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render.ledger(LEDGER))

    assert "75%" in row(capture.get().splitlines(), "prefill")
