"""Wire messages of `HandoffService` to the holder's values and back; bounds are checked here."""

from collections.abc import Sequence
from typing import get_args

from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.handoff.announcement import Announcement, BlockRun, Completed, DigestRun, Opened
from kvrelay.handoff.holds import PullTerms
from kvrelay.rpc import convert, submit
from kvrelay.transfer.digest import DigestKind
from kvrelay.transfer.wire_choice import WireDtype, wire_layout_for
from kvrelay.types import Fingerprint
from kvrelay.v1 import common_pb2, handoff_pb2

MAX_INDEXES = 4096
MAX_UNIQUE_ID_BYTES = 256

_WIRE_DTYPES: dict[str, WireDtype] = {name: name for name in get_args(WireDtype)}
_DIGEST_KINDS = {kind.value for kind in DigestKind}


def handoff_id_from_wire(handoff_id: str) -> str:
    return submit.id_from_wire("handoff_id", handoff_id)


def link_id_from_wire(link_id: str) -> str:
    return submit.id_from_wire("link_id", link_id)


def terms_from_wire(request: handoff_pb2.PullRequest, ours: Fingerprint) -> PullTerms:
    """How the puller wants its blocks, given what it is.

    Raises:
        Incompatible: the two cannot be paired, naming what differs.
        InvalidRequest: it wants what is not known here.
    """
    theirs = fingerprint_from_wire(request.fingerprint, ours)
    asked = _WIRE_DTYPES.get(request.wire_dtype)
    if asked is None:
        raise InvalidRequest("wire_dtype", f"must be one of {', '.join(_WIRE_DTYPES)}")
    if request.digest_kind not in _DIGEST_KINDS:
        raise InvalidRequest("digest_kind", f"must be one of {', '.join(sorted(_DIGEST_KINDS))}")
    wire = wire_layout_for(ours.layout, theirs.layout, asked)
    return PullTerms(
        wire_dtype=wire.dtype, digest_kind=request.digest_kind, limit_tokens=request.limit_tokens
    )


def fingerprint_from_wire(theirs: common_pb2.Fingerprint, ours: Fingerprint) -> Fingerprint:
    """Raises Incompatible, naming what keeps the two from being paired."""
    fingerprint = convert.fingerprint_from_wire(theirs)
    problems = ours.cannot_pair(fingerprint)
    if problems:
        listed = ", ".join(f"{name}: {values}" for name, values in problems.items())
        raise Incompatible(f"fingerprints differ ({listed})", **problems)
    return fingerprint


def indexes_from_wire(indexes: Sequence[int]) -> Sequence[int]:
    if len(indexes) > MAX_INDEXES:
        raise InvalidRequest("indexes", f"{len(indexes)}, at most {MAX_INDEXES}")
    return indexes


def unique_id_from_wire(unique_id: bytes) -> bytes:
    if not 0 < len(unique_id) <= MAX_UNIQUE_ID_BYTES:
        raise InvalidRequest("unique_id", f"{len(unique_id)} bytes, 1 to {MAX_UNIQUE_ID_BYTES}")
    return unique_id


def announcement_to_wire(news: Announcement) -> handoff_pb2.PullResponse:
    return handoff_pb2.PullResponse(
        opened=None if news.opened is None else _opened_to_wire(news.opened),
        blocks=None if news.blocks is None else _blocks_to_wire(news.blocks),
        digests=None if news.digests is None else _digests_to_wire(news.digests),
        complete=None if news.completed is None else _completed_to_wire(news.completed),
    )


def _opened_to_wire(opened: Opened) -> handoff_pb2.PullOpened:
    return handoff_pb2.PullOpened(
        num_tokens=opened.num_tokens,
        num_blocks=opened.num_blocks,
        wire_layout=convert.layout_to_wire(opened.wire_layout),
        is_running=opened.is_running,
    )


def _blocks_to_wire(run: BlockRun) -> handoff_pb2.PullBlocks:
    blocks = [
        handoff_pb2.HeldBlock(
            block_id=block.block_id, generation=block.generation, offset_bytes=block.offset_bytes
        )
        for block in run.blocks
    ]
    return handoff_pb2.PullBlocks(first_index=run.first_index, blocks=blocks)


def _digests_to_wire(run: DigestRun) -> handoff_pb2.PullDigests:
    return handoff_pb2.PullDigests(first_index=run.first_index, digests=run.digests)


def _completed_to_wire(completed: Completed) -> handoff_pb2.PullComplete:
    return handoff_pb2.PullComplete(
        output_token_ids=completed.output_ids,
        num_tokens=completed.num_tokens,
        digest=completed.digest,
    )
