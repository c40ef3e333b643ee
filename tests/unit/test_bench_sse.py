"""Events out of a stream of bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.bench.sse import MAX_EVENT_NUM_BYTES, SseError, SseParser

payloads = st.lists(
    st.binary(min_size=1, max_size=20).filter(lambda data: not {10, 13} & set(data))
)


@given(payloads, st.lists(st.integers(0, 400)), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_they_were_cut(events, cuts, end):
    """Also within a line end."""
    stream = b"".join(b"data: " + event + end + end for event in events)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = SseParser()
    found = []
    for begin, stop in itertools.pairwise(bounds):
        found += parser.feed(stream[begin:stop])

    assert found == events


def test_only_data_counts_and_its_lines_are_joined():
    """Comments, names and ids are passed over; one leading space is none of the data."""
    stream = b": hello\nevent: x\ndata:a\ndata:  b\nid: 1\n\n\n\ndata\n\n"

    assert SseParser().feed(stream) == [b"a\n b", b""]


def test_an_event_without_its_end_is_not_given():
    """The rest may still come."""
    parser = SseParser()

    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def test_an_event_without_bounds_is_refused():
    """Memory is not the server's to fill."""
    parser = SseParser()

    with pytest.raises(SseError, match=str(MAX_EVENT_NUM_BYTES)):
        parser.feed(b"x" * (MAX_EVENT_NUM_BYTES + 1))
