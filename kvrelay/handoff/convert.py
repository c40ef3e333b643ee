"""Wire messages of `HandoffService` to the holder's values and back; bounds are checked here."""

from collections.abc import Sequence
from typing import get_args

from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.handoff.holds import PullTerms
from kvrelay.handoff.keeper import (
    Announcement,
    BlockRun,
    Completed,
    DigestRun,
    Frame,
    Opened,
)
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


def announcement_to_wire(event: Announcement) -> handoff_pb2.PullResponse:
    match event:
        case Opened():
            opened = handoff_pb2.PullOpened(
                num_tokens=event.num_tokens,
                num_blocks=event.num_blocks,
                wire_layout=convert.layout_to_wire(event.wire_layout),
                is_running=event.is_running,
            )
            return handoff_pb2.PullResponse(opened=opened)
        case BlockRun():
            blocks = [
                handoff_pb2.HeldBlock(offset_bytes=block.offset_bytes, generation=block.generation)
                for block in event.blocks
            ]
            run = handoff_pb2.PullBlocks(first_index=event.first_index, blocks=blocks)
            return handoff_pb2.PullResponse(blocks=run)
        case DigestRun():
            digests = handoff_pb2.PullDigests(first_index=event.first_index, digests=event.digests)
            return handoff_pb2.PullResponse(digests=digests)
        case Completed():
            complete = handoff_pb2.PullComplete(
                output_token_ids=event.output_ids,
                num_tokens=event.num_tokens,
                digest=event.digest,
            )
            return handoff_pb2.PullResponse(complete=complete)


def frame_to_wire(frame: Frame) -> handoff_pb2.ReadResponse:
    return handoff_pb2.ReadResponse(
        index=frame.index, offset_bytes=frame.offset_bytes, data=frame.data
    )
