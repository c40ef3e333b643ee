"""Which transport two workers use."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import Incompatible
from kvrelay.transfer.select import (
    NOMINAL_BYTES_PER_S,
    alternatives,
    choose,
    choose_offer,
    explain,
)
from kvrelay.types import TransportOffer


def offer(name, host="here"):
    return TransportOffer(name=name, address=f"{name} of {host}", host=host)


HOST_BOUND = {"cuda_ipc", "shm"}


def offers(*names: str, host: str = "here") -> list[TransportOffer]:
    """Of one worker; only what must stay on one host names it."""
    return [
        TransportOffer(
            name=name, address=f"{name} of {host}", host=host if name in HOST_BOUND else ""
        )
        for name in names
    ]


ALL = tuple(NOMINAL_BYTES_PER_S)
NEWER = offer("newer")


@pytest.mark.parametrize(
    ("holder", "puller", "chosen"),
    [
        (offers(*ALL), offers(*ALL), "cuda_ipc"),
        (offers(*ALL), offers(*ALL, host="there"), "nccl"),
        (offers("shm", "nixl", "stream"), offers("shm", "nixl", "stream"), "shm"),
        (offers("stream", "nixl", "shm"), offers("nixl", "shm", "stream"), "shm"),
        (offers("shm", "nixl", "stream"), offers("shm", "nixl", "stream", host="there"), "nixl"),
        (offers("shm", "stream"), offers("shm", "stream", host="there"), "stream"),
        (offers("shm", "stream"), offers("stream"), "stream"),
        (offers("stream"), offers("cuda_ipc", "nccl", "stream"), "stream"),
        ([NEWER, *offers("stream")], [NEWER, *offers("stream")], "stream"),
    ],
)
def test_before_anything_was_measured_the_nominally_fastest_is_chosen(holder, puller, chosen):
    """Of those that both can do, in whatever order they were offered."""
    assert choose_offer(holder, puller).name == chosen


def test_the_offer_is_the_holders():
    """Its address is where the puller goes."""
    chosen = choose_offer(offers("stream", host="a"), offers("stream", host="b"))

    assert chosen.address == "stream of a"


@pytest.mark.parametrize(
    ("measured", "chosen", "bytes_per_s", "is_measured"),
    [
        ({}, "shm", 6e9, False),
        ({"shm": 1.4e9}, "nixl", 3e9, False),
        ({"shm": 1.4e9, "nixl": 1.3e9}, "shm", 1.4e9, True),
        ({"shm": 0.4e9, "nixl": 0.2e9}, "stream", 1e9, False),
        ({"shm": 0.4e9, "nixl": 0.2e9, "stream": 0.3e9}, "shm", 0.4e9, True),
        ({"shm": 1.4e9, "nixl": 1.5e9}, "nixl", 1.5e9, True),
        ({"stream": 2.9e9}, "shm", 6e9, False),
        ({"stream": 3.1e9}, "stream", 3.1e9, True),
        ({"cuda_ipc": 90e9}, "shm", 6e9, False),
    ],
)
def test_what_was_measured_replaces_what_was_believed(measured, chosen, bytes_per_s, is_measured):
    """A transport that disappoints gives way to the next, until that one disappoints more."""
    common = offers("shm", "nixl", "stream")

    way = choose(common, common, measured)

    assert (way.offer.name, way.bytes_per_s, way.is_measured) == (chosen, bytes_per_s, is_measured)


@pytest.mark.parametrize(
    ("shm_bytes_per_s", "chosen"),
    [(5e9, "shm"), (0.9e9, "shm"), (0.5e9, "shm"), (0.49e9, "stream"), (1e6, "stream")],
)
def test_shared_memory_gives_way_when_bad_and_not_for_a_busy_moment(shm_bytes_per_s, chosen):
    """What is only believed counts half beside a measured one, and must then be the better."""
    common = offers("shm", "stream")

    assert choose_offer(common, common, {"shm": shm_bytes_per_s}).name == chosen


def test_two_that_were_measured_are_compared_in_full():
    """The half is for what nobody saw; a stream that was seen to be a little faster is taken."""
    common = offers("shm", "stream")

    assert choose_offer(common, common, {"shm": 0.9e9, "stream": 0.95e9}).name == "stream"


@given(
    st.lists(st.sampled_from(ALL), unique=True),
    st.lists(st.sampled_from(ALL), unique=True),
    st.booleans(),
    st.dictionaries(st.sampled_from(ALL), st.floats(1.0, 1e12)),
)
def test_no_other_way_that_both_can_do_is_worth_more(holder, puller, is_one_host, measured):
    """By what was measured and half of what is believed, whatever is offered and measured."""
    usable = {name for name in {*holder} & {*puller} if is_one_host or name not in HOST_BOUND}
    here, there = offers(*holder), offers(*puller, host="here" if is_one_host else "there")
    figures = {name: measured.get(name, NOMINAL_BYTES_PER_S[name]) for name in usable}
    worth = {name: figures[name] / (1 if name in measured else 2) for name in usable}
    if not usable:
        with pytest.raises(Incompatible):
            choose(here, there, measured)
        return

    way = choose(here, there, measured)

    assert way.offer in here
    assert way.bytes_per_s == figures[way.offer.name]
    assert worth[way.offer.name] == max(worth.values())


@pytest.mark.parametrize(
    ("holder", "puller", "reason"),
    [
        (offers("shm"), offers("shm", host="there"), "shm: not on one host"),
        (offers("cuda_ipc"), offers("cuda_ipc", host="there"), "cuda_ipc: not on one host"),
        (offers("shm"), offers("stream"), "stream: the holder does not offer it"),
        (offers("nccl"), [], "nccl: the puller does not offer it"),
        ([], [], "shm: the holder does not offer it"),
        ([NEWER], [NEWER], "shm: the holder does not offer it"),
    ],
)
def test_no_common_transport_is_incompatible_with_the_reason(holder, puller, reason):
    """The message and the details say what is wrong with each."""
    with pytest.raises(Incompatible, match=reason) as caught:
        choose_offer(holder, puller)
    assert caught.value.details.keys() == {*ALL}


@pytest.mark.parametrize(
    ("holder", "puller", "measured", "text"),
    [
        (offers(*ALL), offers(*ALL), {"cuda_ipc": 123.4e9},
         "cuda_ipc at 123.4 GB/s; not nccl at 20.0 GB/s nominal; not shm at 6.0 GB/s nominal; "
         "not nixl at 3.0 GB/s nominal; not stream at 1.0 GB/s nominal"),
        (offers("shm", "stream"), offers("shm", "stream", host="there"), {"stream": 12.3e6},
         "stream at 12.3 MB/s; not cuda_ipc: the holder does not offer it; "
         "not nccl: the holder does not offer it; not shm: not on one host; "
         "not nixl: the holder does not offer it"),
        (offers("cuda_ipc", "shm"), offers("shm", "stream"), {"stream": 9e9},
         "shm at 6.0 GB/s nominal; not cuda_ipc: the puller does not offer it; "
         "not nccl: the holder does not offer it; not stream: the holder does not offer it"),
        (offers("shm", "stream"), offers("shm", "stream"), {"shm": 0.9e9},
         "shm at 900.0 MB/s; not cuda_ipc: the holder does not offer it; "
         "not nccl: the holder does not offer it; not stream at 1.0 GB/s nominal"),
        (offers("shm", "stream"), offers("shm", "stream"), {"shm": 0.4e9},
         "stream at 1.0 GB/s nominal; not cuda_ipc: the holder does not offer it; "
         "not nccl: the holder does not offer it; not shm at 400.0 MB/s; "
         "not nixl: the holder does not offer it"),
    ],
)  # fmt: skip
def test_the_choice_is_explained(holder, puller, measured, text):
    """With its figure, and why none that should be better or is offered was taken."""
    assert explain(holder, puller, measured) == text


def test_no_choice_is_explained_too():
    """With what is wrong with each."""
    text = explain(offers("shm"), offers("shm", host="there"))

    assert text.startswith("none; not cuda_ipc: the holder does not offer it; ")
    assert "; not shm: not on one host; " in text


def test_choosing_loads_no_tensor_library():
    """The coordinator may import it."""
    heavy = "torch", "numpy", "grpc", "msgpack"
    code = (
        "import sys, kvrelay.transfer.select\n"
        f"sys.exit(','.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_transport_that_names_its_host_stays_there():
    """NIXL crosses machines only where it was given the devices, and then names none."""
    bound = [TransportOffer(name="nixl", address="a", host="here")]
    other = [TransportOffer(name="nixl", address="b", host="there")]

    assert choose_offer(bound, bound) == bound[0]
    with pytest.raises(Incompatible, match="nixl: not on one host"):
        choose_offer(bound, other)


def test_what_else_both_can_do_comes_best_first():
    """For as long as the best is not ready; without those that only one side has."""
    here, there = offers("nccl", "stream", "shm", "nixl"), offers("shm", "nccl", "stream")

    names = [offer.name for offer in alternatives(here, there, to=here[0])]

    assert names == ["shm", "stream"]


def test_what_else_both_can_do_is_ordered_by_what_was_measured():
    """A way that disappointed comes after one that did better."""
    both = offers("nccl", "shm", "stream")
    measured = {"shm": 0.5e9, "stream": 0.9e9}

    names = [offer.name for offer in alternatives(both, both, measured, to=both[0])]

    assert names == ["stream", "shm"]
