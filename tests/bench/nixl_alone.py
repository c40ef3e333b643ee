"""NIXL with nothing around it: what our transport is compared with.

A bare agent that posts one read and looks until it is over, in the thread that asks. It has no
progress thread, which is the fastest way to use it on few cores.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvrelay.kv.cache import KvCache
from kvrelay.transfer.base import BlockCopy
from kvrelay.transfer.nixl_offer import described


class NixlAlone:
    """Reads from the holder that an offer's address describes, one descriptor per block."""

    def __init__(self, cache: KvCache, address: str) -> None:
        self._nixl: Any = importlib.import_module("nixl_cu13._bindings")
        self._peer = described(address)
        self._begin = cache.bytes.ctypes.data
        self._agent: Any = self._nixl.nixlAgent("alone", self._nixl.nixlAgentConfig())
        self._backends = [self._agent.createBackend("UCX", {})]
        memory = [(self._begin, cache.num_bytes, 0, "")]
        self._agent.registerMem(
            self._nixl.nixlRegDList(self._nixl.DRAM_SEG, memory), self._backends
        )
        self._name = self._agent.loadRemoteMD(self._peer.metadata).decode()

    def read(self, copies: Sequence[BlockCopy]) -> None:
        targets = [(self._begin + copy.target_offset, copy.num_bytes, 0) for copy in copies]
        sources = [(self._peer.begin + copy.source_offset, copy.num_bytes, 0) for copy in copies]
        handle = self._agent.createXferReq(
            self._nixl.NIXL_READ,
            self._descriptors(targets),
            self._descriptors(sources),
            self._name,
            b"",
            self._backends,
        )
        state = self._agent.postXferReq(handle, b"")
        while state == self._nixl.NIXL_IN_PROG:
            state = self._agent.getXferStatus(handle)
        assert state == self._nixl.NIXL_SUCCESS
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        self._agent = None

    def _descriptors(self, ranges: Sequence[tuple[int, int, int]]) -> Any:
        rows = np.array(ranges, np.uint64)
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows)
