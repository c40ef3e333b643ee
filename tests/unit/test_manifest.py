"""The manifest of a cache: what is written is read, and nothing else is believed."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import Incompatible, KvCorrupt
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.manifest import MAX_MANIFEST_BYTES, CacheManifest, decode, encode

LAYOUT = KvLayout(num_layers=30, block_size=16, num_kv_heads=3, head_dim=64, dtype="bfloat16")
GOOD = CacheManifest(worker_id="prefill-0", epoch="e1", layout=LAYOUT, num_blocks=100)


def changed(path: str, value: object) -> bytes:
    fields = msgpack.unpackb(encode(GOOD))
    *parents, name = path.split(".")
    at = fields
    for parent in parents:
        at = at[parent]
    at[name] = value
    return msgpack.packb(fields)


def test_what_is_written_is_read():
    """Every field survives."""
    assert decode(encode(GOOD)) == GOOD
    assert GOOD.num_bytes == 100 * LAYOUT.block_num_bytes


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_blocks", 0),
        ("num_blocks", -1),
        ("num_blocks", 1 << 25),
        ("num_blocks", True),
        ("num_blocks", 1.5),
        ("worker_id", ""),
        ("worker_id", "x" * 257),
        ("worker_id", b"raw"),
        ("epoch", None),
        ("layout", 7),
        ("layout.head_dim", 0),
        ("layout.head_dim", 1 << 20),
        ("layout.num_layers", "30"),
        ("layout.dtype", "float64"),
        ("layout.dtype", ["bfloat16"]),
        ("layout.extra", 1),
        ("extra", 1),
        ("version", "1"),
    ],
)
def test_a_field_out_of_bounds_is_refused(path, value):
    """Wrong type, too small, too large, or unknown: none is mapped by."""
    with pytest.raises(KvCorrupt, match="manifest"):
        decode(changed(path, value))


def test_another_version_is_incompatible():
    """It is not garbage, and says so."""
    with pytest.raises(Incompatible, match="version 2"):
        decode(changed("version", 2))


def test_a_missing_field_is_refused():
    """Nothing has a default."""
    fields = msgpack.unpackb(encode(GOOD))
    del fields["epoch"]
    with pytest.raises(KvCorrupt):
        decode(msgpack.packb(fields))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x81", b"\x91" * 2000, msgpack.packb([1]), b"\x00" * (MAX_MANIFEST_BYTES + 1)],
)
def test_what_is_no_manifest_is_refused(raw):
    """Empty, cut off, too deep, too long."""
    with pytest.raises(KvCorrupt):
        decode(raw)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(raw):
    """Whatever arrives is a manifest or a `ServingError`."""
    with pytest.raises((KvCorrupt, Incompatible)):
        decode(raw)


@given(cut=st.integers(0, len(encode(GOOD)) - 1), junk=st.binary(max_size=4))
def test_a_mangled_manifest_is_refused(cut, junk):
    """Cut anywhere and continued with anything else."""
    raw = encode(GOOD)[:cut] + junk
    if raw != encode(GOOD):
        try:
            decode(raw)
        except (KvCorrupt, Incompatible):
            return
        assert len(raw) == len(encode(GOOD))  # another value in its bounds
