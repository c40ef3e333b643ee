"""Names the place a process runs in, so that two processes can tell whether they share it.

Equal names mean: the same boot of the same kernel, the same user, and the same network and user
namespaces. So an abstract Unix socket of one is reachable from the other, and a container beside
us on the same machine, which could not reach it, has another name.
"""

import hashlib
import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACES = (Path("/proc/self/ns/net"), Path("/proc/self/ns/user"))


def host_identity() -> str:
    """32 hex digits. A digest: the parts are nobody else's business."""
    parts = [_BOOT_ID.read_text().strip(), str(os.geteuid())]
    parts += [str(path.stat().st_ino) for path in _NAMESPACES]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
