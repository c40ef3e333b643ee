"""How ledgers and pools look on a terminal."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrelay.client import Member, Pool
from kvrelay.obs.ledger import Ledger

WIDE_COLUMNS = 132
"""Width at which a row of the pool has room for everything."""

_BAR_CELLS = 32
_STAGE_CELLS = 20
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def ledger(ledger: Ledger) -> RenderableType:
    """Where one request's time went, as bars that add up. Fits 80 columns."""
    stages = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    stages.add_column(width=_STAGE_CELLS)
    stages.add_column(justify="right", width=10)
    stages.add_column(width=_BAR_CELLS, style="cyan", no_wrap=True)
    stages.add_column(justify="right", width=4)
    _add_stages(stages, "time to first token", ledger.ttft_s, ledger.ttft_stages)
    if ledger.gap1_stages:
        _add_stages(stages, "gap to second token", ledger.gap1_s, ledger.gap1_stages)
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", width=_STAGE_CELLS)
    facts.add_column(overflow="fold")
    for name, fact in _facts(ledger):
        facts.add_row(name, Text(fact))
    return Group(Text(_headline(ledger), style="bold"), Text(), stages, Text(), facts)


def _headline(ledger: Ledger) -> str:
    speed = f", {ledger.tpot_s * 1e3:.1f} ms per token" if ledger.tpot_s else ""
    return f"request {ledger.request_id}: {ledger.outcome}, {ledger.e2e_s:.3f} s{speed}"


def _add_stages(table: Table, title: str, total_s: float, stages: Mapping[str, float]) -> None:
    table.add_row(title, f"{total_s * 1e3:.2f} ms", style="bold")
    for name, duration_s in stages.items():
        share = duration_s / total_s if total_s > 0 else 0.0
        table.add_row(f"  {name}", f"{duration_s * 1e3:.2f} ms", _bar(share), f"{share:.0%}")


def _bar(share: float) -> str:
    full, eighths = divmod(round(min(1.0, max(0.0, share)) * _BAR_CELLS * 8), 8)
    return _EIGHTHS[8] * full + (_EIGHTHS[eighths] if eighths else "")


def _facts(ledger: Ledger) -> list[tuple[str, str]]:
    facts = [
        (
            "tokens",
            f"{ledger.prompt_tokens} in ({ledger.cached_prompt_tokens} cached), "
            f"{ledger.completion_tokens} out",
        ),
        ("route", _route(ledger)),
        ("", ledger.route_reason),
    ]
    if ledger.transport:
        facts.append(
            (
                "handoff",
                f"{ledger.handoff_num_bytes / 1e6:.2f} MB by {ledger.transport}, "
                f"{ledger.overlapped_num_bytes / 1e6:.2f} MB of it while prefilling",
            )
        )
    if ledger.handoff_tax_s is not None:
        # Below nothing where the second token came sooner than the others did in the mean.
        facts.append(("handoff tax", f"{max(0.0, ledger.handoff_tax_s) * 1e3:.1f} ms"))
    if ledger.move_gaps_s:
        gaps = ", ".join(f"{gap_s * 1e3:.1f} ms" for gap_s in ledger.move_gaps_s)
        many = "a gap" if len(ledger.move_gaps_s) == 1 else "gaps"
        facts.append(("moves", f"{len(ledger.move_gaps_s)}, with {many} of {gaps}"))
    if ledger.lost_attempts:
        lost = ", ".join(ledger.lost_attempts)
        facts.append(("attempts", f"{ledger.attempts}; given up: {lost}"))
        if ledger.gap1_s > 0 and not ledger.gap1_stages:
            facts.append(("to token 2", f"{ledger.gap1_s * 1e3:.1f} ms"))
    return facts


def _route(ledger: Ledger) -> str:
    if ledger.prefill_worker == ledger.decode_worker or not ledger.decode_worker:
        return ledger.prefill_worker
    return f"{ledger.prefill_worker} → {ledger.decode_worker}"


def pool(pool: Pool, *, is_wide: bool) -> RenderableType:
    """The coordinator and its workers; without `is_wide` what fits 80 columns."""
    mixed = [_mixed(pool)] if len(_kv_dtypes(pool)) > 1 else []
    return Group(_coordinator(pool), *mixed, Text(), _workers(pool, is_wide=is_wide))


def _coordinator(pool: Pool) -> Text:
    state = "ready" if pool.is_ready else f"not ready: {pool.not_ready_reason}"
    return Text(
        f"{state} · {pool.active_requests} active, {pool.finished_requests_total} finished, "
        f"{pool.lost_attempts_total} attempts lost",
        style="green" if pool.is_ready else "yellow",
    )


def _kv_dtypes(pool: Pool) -> list[str]:
    return sorted({member.identity.kv_form for member in pool.members})


def _mixed(pool: Pool) -> Text:
    """What the pool promises less for keeping KV in more than one dtype."""
    dtypes = ", ".join(_kv_dtypes(pool))
    return Text(f"KV is kept as {dtypes}: tokens depend on which workers serve", style="yellow")


def _workers(pool: Pool, *, is_wide: bool) -> Table:
    gap = 2 if is_wide else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name in ("worker", "role", "pid"):
        table.add_column(name, no_wrap=True)
    for name in ("free", "cached", "held", "queued", "wait", "run", "handoffs", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("address", "epoch", "transports") if is_wide else ():
        table.add_column(name, no_wrap=True)
    for member in pool.members:
        row = _row(member) + (_details(member) if is_wide else ())
        table.add_row(*row, style="dim" if member.load.is_draining else None)
    return table


def _row(member: Member) -> tuple[str, ...]:
    who, load = member.identity, member.load
    numbers = (
        load.free_blocks,
        load.cached_blocks,
        load.held_blocks,
        load.queued_prompt_tokens,
        load.waiting_sequences,
        load.running_sequences,
        load.handoffs_total,
    )
    return (
        who.worker_id,
        "drains" if load.is_draining else who.role.value,
        str(who.pid),
        *(str(number) for number in numbers),
        f"{member.load_age_ms / 1e3:.1f} s",
    )


def _details(member: Member) -> tuple[str, ...]:
    who = member.identity
    return (who.address, who.epoch[:8], ", ".join(o.name for o in who.offers))


def pool_json(pool: Pool) -> dict[str, object]:
    """The pool for machines."""
    return {
        "ready": pool.is_ready,
        "not_ready_reason": pool.not_ready_reason,
        "active_requests": pool.active_requests,
        "finished_requests_total": pool.finished_requests_total,
        "lost_attempts_total": pool.lost_attempts_total,
        "kv_dtypes": _kv_dtypes(pool),
        "workers": [_member_json(member) for member in pool.members],
    }


def _member_json(member: Member) -> dict[str, object]:
    who, load = member.identity, member.load
    return {
        "worker_id": who.worker_id,
        "role": who.role.value,
        "pid": who.pid,
        "address": who.address,
        "epoch": who.epoch,
        "blocks": {
            "free": load.free_blocks,
            "cached": load.cached_blocks,
            "held": load.held_blocks,
            "total": who.num_blocks,
        },
        "waiting": load.waiting_sequences,
        "running": load.running_sequences,
        "queued_prompt_tokens": load.queued_prompt_tokens,
        "handoff_holds": load.handoff_holds,
        "waiting_handoffs": load.waiting_handoffs,
        "handoffs_total": load.handoffs_total,
        "preemptions_total": load.preemptions_total,
        "placed_sequences": member.placed_sequences,
        "load_age_ms": member.load_age_ms,
        "draining": load.is_draining,
        "block_size": who.fingerprint.layout.block_size,
        "kv_dtype": who.kv_form,
        "transports": [offer.name for offer in who.offers],
        "links": [
            {
                "holder_id": link.holder_id,
                "transport": link.transport,
                "bytes_per_s": link.bytes_per_s,
            }
            for link in load.links
        ],
    }
