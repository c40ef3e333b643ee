"""What a holder says of the memory whose descriptor it passes along.

The only place that speaks msgpack. Nothing read here is believed before its type and bounds
were checked, because the next thing done with it is a mapping.
"""

from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from kvrelay.errors import Incompatible, KvCorrupt
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout

MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 4096

_MAX_NAME_CHARS = 256
_MAX_NUM_BLOCKS = 1 << 24
_MAX_LAYOUT = {"num_layers": 1024, "block_size": 1024, "num_kv_heads": 1024, "head_dim": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheManifest:
    """Whose memory it is and how it is laid out."""

    worker_id: str
    epoch: str
    layout: KvLayout
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_num_bytes


def encode(manifest: CacheManifest) -> bytes:
    """At most `MAX_MANIFEST_BYTES`."""
    raw: bytes = msgpack.packb({"version": MANIFEST_VERSION, **asdict(manifest)})
    assert len(raw) <= MAX_MANIFEST_BYTES, len(raw)
    return raw


def decode(raw: bytes) -> CacheManifest:
    """The manifest that `encode` wrote.

    Raises:
        Incompatible: written by another version.
        KvCorrupt: anything else than what `encode` writes.
    """
    fields = _fields(raw)
    version = _integer(fields, "version", MANIFEST_VERSION, 1 << 31)
    if version != MANIFEST_VERSION:
        raise Incompatible(f"manifest version {version}, ours is {MANIFEST_VERSION}")
    _expect(fields, "the manifest", {"version", "worker_id", "epoch", "layout", "num_blocks"})
    return CacheManifest(
        worker_id=_name(fields, "worker_id"),
        epoch=_name(fields, "epoch"),
        layout=_layout(fields["layout"]),
        num_blocks=_integer(fields, "num_blocks", 1, _MAX_NUM_BLOCKS),
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


def _layout(fields: object) -> KvLayout:
    if not isinstance(fields, dict):
        raise KvCorrupt("manifest.layout is not a map")
    _expect(fields, "manifest.layout", {*_MAX_LAYOUT, "dtype"})
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_NUM_BYTES:
        raise KvCorrupt(f"manifest.layout.dtype is none of {', '.join(DTYPE_NUM_BYTES)}")
    sizes = {name: _integer(fields, name, 1, most) for name, most in _MAX_LAYOUT.items()}
    return KvLayout(dtype=dtype, **sizes)


def _expect(fields: dict[str, Any], what: str, names: set[str]) -> None:
    if fields.keys() != names:
        raise KvCorrupt(f"{what} has not exactly the fields {', '.join(sorted(names))}")


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
