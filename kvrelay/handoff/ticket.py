"""Tickets: the coordinator's word that this worker may pull this handoff from that one.

A ticket is a keyed BLAKE2b-128 over everything it is about. The key is shared by the coordinator
and the holder alone, so a puller can show a ticket and not make one. It is good for one use because
the handoff that it names is: a hold ends once, and its id is remembered.

Pure: whoever mints a key has the randomness.
"""

import hmac
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import Final

KEY_NUM_BYTES: Final = 32

TICKET_NUM_BYTES: Final = 16

_PURPOSE: Final = b"kvrelay ticket 1"
_LENGTH_NUM_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What is signed. Epochs are of processes: after a restart it is about nobody."""

    handoff_id: str
    holder_id: str
    holder_epoch: str
    puller_id: str
    puller_epoch: str


def sign(ticket: Ticket, key: bytes) -> bytes:
    """The bytes that the puller shows."""
    assert len(key) == KEY_NUM_BYTES
    state = blake2b(key=key, digest_size=TICKET_NUM_BYTES, person=_PURPOSE)
    for field in astuple(ticket):
        # Lengths first, or the end of one field could be read as the beginning of the next.
        encoded = field.encode()
        state.update(len(encoded).to_bytes(_LENGTH_NUM_BYTES, "little"))
        state.update(encoded)
    return state.digest()


def is_genuine(ticket: Ticket, signature: bytes, key: bytes) -> bool:
    """Whether `signature` was made for exactly this ticket. Takes as long whatever is wrong."""
    return hmac.compare_digest(sign(ticket, key), signature)
