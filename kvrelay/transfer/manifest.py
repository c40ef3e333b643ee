"""What a holder says of the memory whose descriptor it passes along.

The only place that speaks msgpack. Nothing read here is believed before its type and bounds
were checked, because the next thing done with it is a mapping.
"""

from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from kvrelay.errors import Incompatible, KvCorrupt

MANIFEST_VERSION = 2
GENERATION_NUM_BYTES = 4
MAX_MANIFEST_BYTES = 4096

_MAX_NAME_CHARS = 256
_MAX_NUM_BYTES = 1 << 46


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryManifest:
    """Whose memory it is and how much."""

    worker_id: str
    epoch: str
    num_bytes: int
    resident_num_bytes: int
    """Of these, from the beginning, what is in memory now. The rest comes when it is touched."""

    num_blocks: int
    """0: the memory is a page about device memory, not the KV itself."""

    generations_offset: int
    """Where the generations of all blocks are, 32 bits each."""


def encode(manifest: MemoryManifest) -> bytes:
    """At most `MAX_MANIFEST_BYTES`."""
    raw: bytes = msgpack.packb({"version": MANIFEST_VERSION, **asdict(manifest)})
    assert len(raw) <= MAX_MANIFEST_BYTES, len(raw)
    return raw


def decode(raw: bytes) -> MemoryManifest:
    """The manifest that `encode` wrote.

    Raises:
        Incompatible: written by another version.
        KvCorrupt: anything else than what `encode` writes.
    """
    fields = _fields(raw)
    version = _integer(fields, "version", 1, 1 << 31)
    if version != MANIFEST_VERSION:
        raise Incompatible(f"manifest version {version}, ours is {MANIFEST_VERSION}")
    _expect(
        fields,
        {
            "version",
            "worker_id",
            "epoch",
            "num_bytes",
            "resident_num_bytes",
            "num_blocks",
            "generations_offset",
        },
    )
    num_bytes = _integer(fields, "num_bytes", 1, _MAX_NUM_BYTES)
    num_blocks = _integer(fields, "num_blocks", 0, num_bytes // GENERATION_NUM_BYTES)
    most_offset = num_bytes - num_blocks * GENERATION_NUM_BYTES
    return MemoryManifest(
        worker_id=_name(fields, "worker_id"),
        epoch=_name(fields, "epoch"),
        num_bytes=num_bytes,
        resident_num_bytes=_integer(fields, "resident_num_bytes", 0, num_bytes),
        num_blocks=num_blocks,
        generations_offset=_integer(fields, "generations_offset", 0, most_offset),
    )


def _fields(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise KvCorrupt(f"manifest of {len(raw)} bytes, limit {MAX_MANIFEST_BYTES}")
    try:
        fields = msgpack.unpackb(raw)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise KvCorrupt(f"manifest is not msgpack: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise KvCorrupt("manifest is not a map")
    return fields


def _expect(fields: dict[str, Any], names: set[str]) -> None:
    if fields.keys() != names:
        raise KvCorrupt(f"the manifest has not exactly the fields {', '.join(sorted(names))}")


def _integer(fields: dict[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    # A bool is an int to Python, and never meant here.
    if type(value) is not int or not least <= value <= most:
        raise KvCorrupt(f"manifest.{name} is not an integer in [{least}, {most}]")
    return value


def _name(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARS:
        raise KvCorrupt(f"manifest.{name} is not 1 to {_MAX_NAME_CHARS} characters")
    return value
