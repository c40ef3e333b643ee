"""The manifest of a memory: what is written is read, and nothing else is believed."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import Incompatible, KvCorrupt
from kvrelay.transfer.manifest import (
    MANIFEST_VERSION,
    MAX_MANIFEST_BYTES,
    MemoryManifest,
    decode,
    encode,
)

GOOD = MemoryManifest(
    worker_id="prefill-0",
    epoch="e1",
    num_bytes=1 << 30,
    resident_num_bytes=1 << 29,
    num_blocks=100,
    generations_offset=(1 << 30) - 400,
)


def changed(name: str, value: object) -> bytes:
    fields = msgpack.unpackb(encode(GOOD))
    fields[name] = value
    return msgpack.packb(fields)


def test_what_is_written_is_read():
    """Every field survives."""
    assert decode(encode(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bytes", 0),
        ("num_bytes", -1),
        ("num_bytes", (1 << 46) + 1),
        ("num_bytes", True),
        ("num_bytes", 1.5),
        ("num_bytes", "4096"),
        ("num_bytes", None),
        ("resident_num_bytes", -1),
        ("resident_num_bytes", (1 << 30) + 1),
        ("resident_num_bytes", False),
        ("num_blocks", -1),
        ("num_blocks", 101),  # their generations would end past the memory
        ("num_blocks", 1 << 40),
        ("num_blocks", 2.0),
        ("generations_offset", -1),
        ("generations_offset", (1 << 30) - 399),
        ("generations_offset", None),
        ("worker_id", ""),
        ("worker_id", "x" * 257),
        ("worker_id", b"raw"),
        ("epoch", None),
        ("extra", 1),
        ("version", "1"),
    ],
)
def test_a_field_out_of_bounds_is_refused(name, value):
    """Wrong type, too small, too large, or unknown: none is mapped by."""
    with pytest.raises(KvCorrupt, match="manifest"):
        decode(changed(name, value))


@pytest.mark.parametrize("version", [1, MANIFEST_VERSION + 1, 1 << 30])
def test_another_version_is_incompatible(version):
    """It is not garbage, and says so."""
    with pytest.raises(Incompatible, match=f"version {version}"):
        decode(changed("version", version))


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
            read = decode(raw)
        except (KvCorrupt, Incompatible):
            return
        # Another number in its bounds, at the very end.
        assert replace(read, generations_offset=GOOD.generations_offset) == GOOD


def test_a_memory_without_blocks_has_no_generations():
    """A page about device memory is a memory, too."""
    page = replace(GOOD, num_bytes=4096, resident_num_bytes=0, num_blocks=0, generations_offset=0)
    assert decode(encode(page)) == page
