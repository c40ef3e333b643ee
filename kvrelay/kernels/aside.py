"""Work on a device beside its computation, for threads that wait until it is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched inside has a stream of its own, and is over at the end, however it ends.

    It waits for nothing that was launched before: who needs that has waited for it. On a device
    that is the host there is nothing to do.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()
