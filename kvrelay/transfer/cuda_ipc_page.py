"""What a holder tells of its device memory: one page of ordinary shared memory.

The page is passed to peers the way a whole cache is on a machine without a device (`shm_serve`,
`shm_map`): so only processes of our own user ever see the handles, and the connection that it came
over tells each side when the other is gone.
"""

import fcntl
import os
import struct
from dataclasses import dataclass

from kvrelay.errors import Incompatible, KvCorrupt
from kvrelay.transfer.cuda_runtime import HANDLE_NUM_BYTES

_MAGIC = b"kvrelay-cuda-ipc"
_VERSION = 1
_PAGE = struct.Struct(f"<16sI16s{HANDLE_NUM_BYTES}s{HANDLE_NUM_BYTES}sQQ")

PAGE_NUM_BYTES = _PAGE.size

_MAX_NUM_BYTES = 1 << 46


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePage:
    """One process's registered device memory."""

    process: bytes
    """Token of the process; CUDA does not map a process's memory into itself."""

    memory: bytes
    """IPC handle of the allocation."""

    offset: int
    """Of our memory in it."""

    num_bytes: int
    written: bytes
    """IPC handle of the event that says when what was announced is in memory."""


def encode(page: DevicePage) -> bytes:
    """`PAGE_NUM_BYTES` bytes."""
    return _PAGE.pack(
        *(_MAGIC, _VERSION, page.process, page.memory, page.written, page.offset, page.num_bytes)
    )


def decode(raw: bytes) -> DevicePage:
    """The page that `encode` wrote.

    Raises:
        Incompatible: written by another version.
        KvCorrupt: anything else.
    """
    if len(raw) != PAGE_NUM_BYTES:
        raise KvCorrupt(f"a page of {len(raw)} bytes, {PAGE_NUM_BYTES} expected")
    magic, version, process, memory, written, offset, num_bytes = _PAGE.unpack(raw)
    if magic != _MAGIC:
        raise KvCorrupt("a page that does not describe device memory")
    if version != _VERSION:
        raise Incompatible(f"device page of version {version}, ours is {_VERSION}")
    if not 0 < num_bytes <= _MAX_NUM_BYTES or offset > _MAX_NUM_BYTES:
        raise KvCorrupt(f"device memory of {num_bytes} bytes at {offset}")
    return DevicePage(
        process=process, memory=memory, offset=offset, num_bytes=num_bytes, written=written
    )


def sealed(page: DevicePage) -> int:
    """A descriptor of memory that holds `page` and cannot be changed or resized any more."""
    fd = os.memfd_create("kvrelay-kv-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, encode(page))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd
