"""Which transport two workers use."""

import subprocess
import sys

import pytest

from kvrelay.errors import Incompatible
from kvrelay.transfer.select import choose_offer, explain
from kvrelay.types import TransportOffer

SHM_HERE = TransportOffer(name="shm", address="kvrelay-shm-1", host="here")
SHM_THERE = TransportOffer(name="shm", address="kvrelay-shm-2", host="there")
STREAM = TransportOffer(name="stream", address="", host="")
NEWER = TransportOffer(name="newer", address="", host="")


@pytest.mark.parametrize(
    ("holder", "puller", "chosen"),
    [
        ([SHM_HERE, STREAM], [SHM_HERE, STREAM], "shm"),
        ([STREAM, SHM_HERE], [STREAM, SHM_HERE], "shm"),
        ([SHM_HERE, STREAM], [SHM_THERE, STREAM], "stream"),
        ([SHM_HERE, STREAM], [STREAM], "stream"),
        ([STREAM], [SHM_HERE, STREAM], "stream"),
        ([NEWER, STREAM], [NEWER, STREAM], "stream"),
    ],
)
def test_the_best_common_transport_is_chosen(holder, puller, chosen):
    """shm on one host, else stream, in whatever order they were offered."""
    assert choose_offer(holder, puller).name == chosen


def test_the_offer_is_the_holders():
    """Its address is where the puller goes."""
    mine = TransportOffer(name="shm", address="kvrelay-shm-mine", host="here")
    assert choose_offer([SHM_HERE], [mine]) == SHM_HERE


@pytest.mark.parametrize(
    ("holder", "puller", "reason"),
    [
        ([SHM_HERE], [SHM_THERE], "shm: not on one host"),
        ([SHM_HERE], [STREAM], "stream: the holder does not offer it"),
        ([STREAM], [], "stream: the puller does not offer it"),
        ([], [], "shm: the holder does not offer it"),
        ([NEWER], [NEWER], "shm: the holder does not offer it"),
    ],
)
def test_no_common_transport_is_incompatible_with_the_reason(holder, puller, reason):
    """The message and the details say what is wrong with each."""
    with pytest.raises(Incompatible, match=reason) as caught:
        choose_offer(holder, puller)
    assert caught.value.details.keys() == {"shm", "stream"}


def test_the_choice_is_explained():
    """With what was wrong with the better ones."""
    assert explain([SHM_HERE, STREAM], [SHM_HERE, STREAM]) == "shm"
    assert explain([SHM_HERE, STREAM], [SHM_THERE, STREAM]) == "stream; not shm: not on one host"
    assert explain([SHM_HERE], [SHM_THERE]) == (
        "none; not shm: not on one host; not stream: the holder does not offer it"
    )


def test_choosing_loads_no_tensor_library():
    """The coordinator may import it."""
    heavy = "torch", "numpy", "grpc", "msgpack"
    code = (
        "import sys, kvrelay.transfer.select\n"
        f"sys.exit(','.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
