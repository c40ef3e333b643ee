"""Only the ticket that the coordinator signed for exactly this handoff passes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import PeerUnavailable, PermissionDenied
from kvrelay.handoff.desk import TicketDesk
from kvrelay.handoff.ticket import KEY_NUM_BYTES, TICKET_NUM_BYTES, Ticket, is_genuine, sign

FIELDS = ("handoff_id", "holder_id", "holder_epoch", "puller_id", "puller_epoch")
KEY, OTHER_KEY, THIRD_KEY = (bytes([i]) * KEY_NUM_BYTES for i in range(3))
TICKET = Ticket(
    handoff_id="ab" * 16, holder_id="p0", holder_epoch="e0", puller_id="d0", puller_epoch="e1"
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
tickets = st.builds(Ticket, **dict.fromkeys(FIELDS, text))
keys = st.binary(min_size=KEY_NUM_BYTES, max_size=KEY_NUM_BYTES)


def desk(*given_keys, worker_id="p0", epoch="e0"):
    made = TicketDesk(worker_id=worker_id, epoch=epoch)
    for key in given_keys:
        made.take_key(key)
    return made


def show(where, signature, **claims):
    """What a puller says, together with its ticket."""
    said = replace(TICKET, **claims)
    where.check(said.handoff_id, said.puller_id, said.puller_epoch, signature)


@given(tickets, keys)
def test_a_signed_ticket_is_genuine(ticket, key):
    """Under the key that signed it, each time."""
    signature = sign(ticket, key)

    assert len(signature) == TICKET_NUM_BYTES
    assert is_genuine(ticket, signature, key)


@given(tickets, keys, st.sampled_from(FIELDS), text)
def test_a_ticket_is_good_for_nothing_but_what_it_names(ticket, key, field, value):
    """Another handoff, worker or epoch is another ticket."""
    other = replace(ticket, **{field: value})

    assert is_genuine(other, sign(ticket, key), key) == (other == ticket)


@given(tickets, keys, st.integers(0, 8 * TICKET_NUM_BYTES - 1))
def test_an_altered_ticket_is_not_genuine(ticket, key, bit):
    """Not by one bit."""
    signature = bytearray(sign(ticket, key))
    signature[bit // 8] ^= 1 << bit % 8

    assert not is_genuine(ticket, bytes(signature), key)


@given(tickets, keys, st.integers(0, 2 * TICKET_NUM_BYTES).filter(lambda n: n != TICKET_NUM_BYTES))
def test_a_ticket_of_another_length_is_not_genuine(ticket, key, num_bytes):
    """Neither the beginning of one, nor one with something behind."""
    signature = (sign(ticket, key) * 2)[:num_bytes]

    assert not is_genuine(ticket, signature, key)


@given(tickets, keys, keys)
def test_a_ticket_signed_with_another_key_is_not_genuine(ticket, key, other):
    """Each membership has its own."""
    assert is_genuine(ticket, sign(ticket, other), key) == (key == other)


@given(st.lists(text, min_size=6, max_size=6), keys, st.integers(0, 3))
def test_the_end_of_a_field_cannot_be_moved_into_the_next(parts, key, at):
    """Equal text cut elsewhere is another ticket."""
    before, moved, after, *rest = parts
    one, other = [*rest], [*rest]
    one[at:at] = [before + moved, after]
    other[at:at] = [before, moved + after]
    mine, theirs = (Ticket(**dict(zip(FIELDS, cut, strict=True))) for cut in (one, other))

    assert is_genuine(mine, sign(theirs, key), key) == (mine == theirs)


def test_the_desk_lets_the_named_puller_pass():
    """As often as it asks: that a hold ends once is the hold's business."""
    at = desk(KEY)
    signature = sign(TICKET, KEY)

    show(at, signature)
    show(at, signature)


@pytest.mark.parametrize(
    "claims", [{"handoff_id": "cd" * 16}, {"puller_id": "d1"}, {"puller_epoch": "e2"}]
)
def test_a_ticket_shown_for_something_else_is_refused(claims):
    """Another handoff, another worker, or the same one started anew."""
    with pytest.raises(PermissionDenied):
        show(desk(KEY), sign(TICKET, KEY), **claims)


@pytest.mark.parametrize("who", [{"worker_id": "p1"}, {"epoch": "e9"}])
def test_a_ticket_for_another_holder_is_refused(who):
    """Under the same key too: it names its holder, and the process."""
    with pytest.raises(PermissionDenied):
        show(desk(KEY, **who), sign(TICKET, KEY))


@pytest.mark.parametrize("signature", [b"", b"\0" * TICKET_NUM_BYTES, b"\0" * 4096])
def test_no_ticket_is_no_ticket(signature):
    """Absent, made up, or far too long."""
    with pytest.raises(PermissionDenied):
        show(desk(KEY), signature)


def test_a_worker_in_no_pool_cannot_tell():
    """Which is no verdict about the ticket: it may be asked again."""
    with pytest.raises(PeerUnavailable, match="not in a pool yet"):
        show(desk(), sign(TICKET, KEY))


def test_the_key_of_the_membership_before_still_counts_and_no_older_one():
    """A late call is answered by its hold, which has lapsed, and not as a forgery."""
    at = desk(KEY, OTHER_KEY)
    show(at, sign(TICKET, KEY))
    show(at, sign(TICKET, OTHER_KEY))

    at.take_key(THIRD_KEY)
    show(at, sign(TICKET, OTHER_KEY))
    with pytest.raises(PermissionDenied):
        show(at, sign(TICKET, KEY))
