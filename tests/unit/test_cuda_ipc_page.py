"""What a holder tells of its device memory, and what is not believed."""

import os

import pytest

from kvrelay.errors import Incompatible, KvCorrupt
from kvrelay.transfer import cuda_ipc_page
from kvrelay.transfer.cuda_ipc_page import PAGE_NUM_BYTES, DevicePage


def page(**changes) -> DevicePage:
    fields = {
        "process": bytes(range(16)),
        "memory": bytes(range(64)),
        "offset": 512,
        "num_bytes": 1 << 30,
        "written": bytes(range(64, 128)),
    }
    return DevicePage(**{**fields, **changes})


def test_what_is_written_is_what_is_read():
    """Handles with zero bytes in them, too."""
    for one in (page(), page(memory=bytes(64)), page(offset=0, num_bytes=1)):
        assert cuda_ipc_page.decode(cuda_ipc_page.encode(one)) == one


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(PAGE_NUM_BYTES),
        cuda_ipc_page.encode(page())[:-1],
        cuda_ipc_page.encode(page()) + b"\0",
        cuda_ipc_page.encode(page(num_bytes=0)),
        cuda_ipc_page.encode(page(num_bytes=1 << 60)),
        cuda_ipc_page.encode(page(offset=1 << 60)),
    ],
    ids=["empty", "zeros", "short", "long", "no-bytes", "too-many", "too-far"],
)
def test_anything_else_is_corrupt(raw):
    """Before CUDA is asked to map it."""
    with pytest.raises(KvCorrupt):
        cuda_ipc_page.decode(raw)


def test_another_version_is_incompatible():
    """By its number."""
    raw = bytearray(cuda_ipc_page.encode(page()))
    raw[16] = 7
    with pytest.raises(Incompatible, match="version 7, ours is 1"):
        cuda_ipc_page.decode(bytes(raw))


def test_a_served_page_can_never_change():
    """Neither in size, which would kill its readers, nor in what it says."""
    fd = cuda_ipc_page.sealed(page())
    try:
        assert os.pread(fd, 4096, 0) == cuda_ipc_page.encode(page())
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)
