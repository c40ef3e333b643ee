"""How ledgers and pools look on a terminal."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrelay.client import Member, Pool
from kvrelay.obs.ledger import Ledger

_BAR_CELLS = 32
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def ledger(ledger: Ledger) -> RenderableType:
    """Where one request's time went, as bars that add up."""
    parts: list[RenderableType] = [Text(_headline(ledger), style="bold")]
    parts.append(_stages("time to first token", ledger.ttft_s, ledger.ttft_stages))
    if ledger.gap1_stages:
        parts.append(_stages("gap to the second token", ledger.gap1_s, ledger.gap1_stages))
    parts += [Text(line) for line in _facts(ledger)]
    return Group(*parts)


def _headline(ledger: Ledger) -> str:
    speed = f", {ledger.tpot_s * 1e3:.1f} ms per token" if ledger.tpot_s else ""
    return f"request {ledger.request_id}: {ledger.outcome}, {ledger.e2e_s:.3f} s{speed}"


def _stages(title: str, total_s: float, stages: Mapping[str, float]) -> Table:
    table = Table(title=f"{title}: {total_s * 1e3:.1f} ms", title_justify="left", box=None)
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_column("", width=_BAR_CELLS, style="cyan", no_wrap=True)
    table.add_column("", justify="right")
    for name, duration_s in stages.items():
        share = duration_s / total_s if total_s > 0 else 0.0
        table.add_row(name, f"{duration_s * 1e3:.2f}", _bar(share), f"{share:.0%}")
    return table


def _bar(share: float) -> str:
    full, eighths = divmod(round(min(1.0, max(0.0, share)) * _BAR_CELLS * 8), 8)
    return _EIGHTHS[8] * full + (_EIGHTHS[eighths] if eighths else "")


def _facts(ledger: Ledger) -> list[str]:
    lines = [
        f"tokens: {ledger.prompt_tokens} in ({ledger.cached_prompt_tokens} cached), "
        f"{ledger.completion_tokens} out",
        f"route: {_route(ledger)} ({ledger.route_reason})",
    ]
    if ledger.transport:
        lines.append(
            f"handoff: {ledger.handoff_num_bytes / 1e6:.2f} MB by {ledger.transport}, "
            f"{ledger.overlapped_num_bytes / 1e6:.2f} MB while prefilling"
        )
    if ledger.handoff_tax_s is not None:
        lines.append(f"handoff tax: {ledger.handoff_tax_s * 1e3:.1f} ms")
    if ledger.lost_attempts:
        lost = ", ".join(ledger.lost_attempts)
        lines.append(f"attempts: {ledger.attempts}; given up: {lost}")
    return lines


def _route(ledger: Ledger) -> str:
    if ledger.prefill_worker == ledger.decode_worker or not ledger.decode_worker:
        return ledger.prefill_worker
    return f"{ledger.prefill_worker} → {ledger.decode_worker}"


def pool(pool: Pool) -> RenderableType:
    """The coordinator and its workers."""
    return Group(_coordinator(pool), _workers(pool))


def _coordinator(pool: Pool) -> Text:
    state = "ready" if pool.is_ready else f"not ready: {pool.not_ready_reason}"
    return Text(
        f"{state} · {pool.active_requests} active, {pool.finished_requests_total} finished, "
        f"{pool.lost_attempts_total} attempts lost",
        style="green" if pool.is_ready else "yellow",
    )


def _workers(pool: Pool) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("worker", "role", "pid", "address", "epoch"):
        table.add_column(name, no_wrap=True)
    for name in ("free", "cached", "held", "waiting", "queued", "running", "handoffs", "age"):
        table.add_column(name, justify="right")
    table.add_column("transports")
    for member in pool.members:
        table.add_row(*_row(member), style="dim" if member.load.is_draining else None)
    return table


def _row(member: Member) -> tuple[str, ...]:
    who, load = member.identity, member.load
    numbers = (
        load.free_blocks,
        load.cached_blocks,
        load.held_blocks,
        load.waiting_sequences,
        load.queued_prompt_tokens,
        load.running_sequences,
        load.handoffs_total,
    )
    return (
        who.worker_id,
        f"{who.role.value}{' (draining)' if load.is_draining else ''}",
        str(who.pid),
        who.address,
        who.epoch[:8],
        *(str(number) for number in numbers),
        f"{member.load_age_ms} ms",
        ", ".join(offer.name for offer in who.offers),
    )


def pool_json(pool: Pool) -> dict[str, object]:
    """The pool for machines."""
    return {
        "ready": pool.is_ready,
        "not_ready_reason": pool.not_ready_reason,
        "active_requests": pool.active_requests,
        "finished_requests_total": pool.finished_requests_total,
        "lost_attempts_total": pool.lost_attempts_total,
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
        "handoffs_total": load.handoffs_total,
        "preemptions_total": load.preemptions_total,
        "placed_sequences": member.placed_sequences,
        "load_age_ms": member.load_age_ms,
        "draining": load.is_draining,
        "transports": [offer.name for offer in who.offers],
    }
