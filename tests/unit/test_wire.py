"""KV written again in another form is what the definition of the bytes says, and nothing else is
written."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kernels import wire as device_wire
from kvrelay.kv import wire
from kvrelay.kv.cache import KvCache, scales_of, values_of
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.wire_choice import wire_layout_for
from tests.support import wire_cases

FP8_NUMBERS = np.array(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)]
)[:127]
"""What the bytes 0x00 .. 0x7e mean."""


def fp8(x: float) -> int:
    """The nearest number's byte; of two as near, the even one."""
    distance = np.abs(FP8_NUMBERS - min(abs(x), 448.0))
    nearest = np.flatnonzero(distance == distance.min())
    return int(nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0]) | (
        0x80 if np.signbit(x) else 0
    )


def bfloat16(x: np.float32) -> np.uint16:
    """Of a finite number: the upper half of its bits, rounded to even."""
    bits = int(x.view(np.uint32))
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def float32(bits: np.uint16) -> np.float32:
    return np.uint32(int(bits) << 16).view(np.float32)


def row_of(x: np.ndarray, dtype: str) -> bytes:
    """One slot and head, values and then scale, number by number."""
    if dtype == "float32":
        return x.tobytes()
    if dtype == "bfloat16":
        return b"".join(bfloat16(number).tobytes() for number in x)
    if dtype == "fp8":
        return bytes(fp8(number) for number in x)
    scale = bfloat16(np.abs(x).max() / np.float32(127))
    by = float32(scale)
    whole = np.rint(x / by) if by > 0 else np.zeros_like(x)
    return whole.clip(-127, 127).astype(np.int8).tobytes() + scale.tobytes()


def numbers_of(row: bytes, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return np.frombuffer(row, np.float32)
    if dtype == "bfloat16":
        return np.array([float32(bits) for bits in np.frombuffer(row, np.uint16)])
    if dtype == "fp8":
        signs = [-1.0 if byte & 0x80 else 1.0 for byte in row]
        sizes = FP8_NUMBERS[[byte & 0x7F for byte in row]]
        return np.copysign(sizes, signs).astype(np.float32)
    scale = float32(np.frombuffer(row[-2:], np.uint16)[0])
    return np.frombuffer(row[:-2], np.int8).astype(np.float32) * scale


def rows(memory: torch.Tensor, side: wire.Blocks, token: int) -> list[bytes]:
    """Of one token: each layer, K and V, and head."""
    block, slot = divmod(token - side.first_token, side.layout.block_size)
    there = memory[side.offsets[block] :][: side.layout.block_num_bytes]
    values = values_of(there, side.layout, 1)[0, :, :, slot].contiguous().view(torch.uint8)
    found = [row.numpy().tobytes() for row in values.flatten(0, 2)]
    scales = scales_of(there, side.layout, 1)
    if scales is None:
        return found
    bits = scales[0, :, :, slot].contiguous().view(torch.uint8).view(-1, 2)
    return [row + scale.numpy().tobytes() for row, scale in zip(found, bits, strict=True)]


@pytest.mark.parametrize("target", wire_cases.DTYPES)
@pytest.mark.parametrize("source", wire_cases.DTYPES)
def test_every_number_is_what_the_definition_makes_of_it(source, target):
    """Rows of any size, of zeros, and of what no scale can hold; number by number."""
    memory, what = wire_cases.case(
        wire_cases.layout(source, block_size=8),
        wire_cases.layout(target, block_size=16),
        first_token=9,
        end_token=60,
        seed=2,
    )
    wire.rewrite(memory, what)
    for token in range(what.first_token, what.end_token):
        before, after = rows(memory, what.source, token), rows(memory, what.target, token)
        for old, new in zip(before, after, strict=True):
            assert new == (old if source == target else row_of(numbers_of(old, source), target))


@pytest.mark.parametrize("dtypes", [("bfloat16", "int8"), ("int8", "int8"), ("fp8", "bfloat16")])
@pytest.mark.parametrize("block_sizes", [(8, 8), (8, 32), (32, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("tokens", [(0, 64), (0, 1), (31, 33), (7, 50), (20, 20)], ids=str)
def test_nothing_but_the_named_slots_is_written(dtypes, block_sizes, tokens):
    """Other slots of the same blocks, other blocks and the source keep every byte."""
    memory, what = wire_cases.case(
        wire_cases.layout(dtypes[0], block_size=block_sizes[0]),
        wire_cases.layout(dtypes[1], block_size=block_sizes[1]),
        first_token=tokens[0],
        end_token=tokens[1],
        seed=3,
    )
    before = memory.clone()
    wire.rewrite(memory, what)
    written = torch.zeros(len(memory), dtype=torch.bool)
    side = what.target
    for token in range(*tokens):
        block, slot = divmod(token, side.layout.block_size)
        there = written[side.offsets[block] :][: side.layout.block_num_bytes].view(torch.uint8)
        values_of(there, side.layout, 1)[0, :, :, slot].view(torch.uint8).fill_(1)
        scales = scales_of(there, side.layout, 1)
        if scales is not None:
            scales[0, :, :, slot].view(torch.uint8).fill_(1)
    assert torch.equal(before[~written], memory[~written])


@given(
    block_sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    tokens=st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted),
    skipped=st.integers(0, 5),
)
def test_runs_name_every_token_once_in_order(block_sizes, tokens, skipped):
    """However the blocks of one side lie across those of the other."""
    source, target = (wire_cases.layout("fp8", block_size=size) for size in block_sizes)
    first_token, end_token = (token + skipped * source.block_size for token in tokens)
    what = wire.Rewrite(
        source=wire.Blocks(
            layout=source, offsets=[0] * 120, first_token=skipped * source.block_size
        ),
        target=wire.Blocks(layout=target, offsets=[0] * 240),
        first_token=first_token,
        end_token=end_token,
    )
    of, to = [], []
    for run in wire.runs(what):
        assert 0 < run.num_tokens <= min(block_sizes)
        for i in range(run.num_tokens):
            assert run.source_slot + i < source.block_size
            assert run.target_slot + i < target.block_size
            of.append((run.source_block + skipped) * source.block_size + run.source_slot + i)
            to.append(run.target_block * target.block_size + run.target_slot + i)
    assert of == to == list(range(first_token, end_token))


def cache_of(own: KvLayout, form: KvLayout, *, num_wire: int) -> tuple[KvCache, list[int]]:
    """With staging for wire blocks, and where those begin."""
    cache = KvCache(
        own,
        own.num_blocks_for(num_wire * form.block_size) + 2,
        shareable=False,
        staging_num_bytes=num_wire * form.block_num_bytes,
    )
    return cache, [cache.staging_offset + i * form.block_num_bytes for i in range(num_wire)]


@pytest.mark.parametrize("puller_dtype", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("holder_dtype", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("block_sizes", [(16, 16), (16, 64), (64, 16), (32, 16)], ids=str)
def test_a_handoff_lands_alike_in_batches_and_at_once(block_sizes, holder_dtype, puller_dtype):
    """Packed, copied, and unpacked as wire blocks arrive; the last is partly full."""
    holder = wire_cases.layout(holder_dtype, block_size=block_sizes[0])
    puller = wire_cases.layout(puller_dtype, block_size=block_sizes[1])
    form = wire_layout_for(holder, puller, "auto")
    num_tokens = 3 * 64 - 5
    num_wire = form.num_blocks_for(num_tokens)
    at_holder, packed = cache_of(holder, form, num_wire=num_wire)
    blocks = list(reversed(range(num_wire)))
    own = [block * holder.block_num_bytes for block in blocks]
    sent = torch.from_numpy(at_holder.bytes)
    wire_cases.fill(sent, wire.Blocks(layout=holder, offsets=own), seed=4)
    if form == holder:
        packed = own
    else:
        wire.pack(at_holder, blocks, form, packed)

    table = list(range(1, puller.num_blocks_for(num_tokens) + 1))
    at_once, in_batches = (cache_of(puller, form, num_wire=num_wire) for _ in range(2))
    for (cache, landed), batch in ((at_once, num_wire), (in_batches, 2)):
        for first in range(0, num_wire, batch):
            last = min(first + batch, num_wire)
            for i in range(first, last):
                there = at_holder.range_bytes(packed[i], form.block_num_bytes)
                cache.range_bytes(landed[i], form.block_num_bytes)[:] = there
            wire.unpack(
                cache,
                form,
                landed[first:last],
                first_wire_index=first,
                block_table=table,
                first_token=first * form.block_size,
                end_token=min(last * form.block_size, num_tokens),
            )

    here = torch.from_numpy(in_batches[0].bytes)
    assert torch.equal(here, torch.from_numpy(at_once[0].bytes))
    at_puller = wire.Blocks(
        layout=puller, offsets=[block * puller.block_num_bytes for block in table]
    )
    if form.dtype == puller.dtype:
        for token in range(num_tokens):
            old = rows(sent, wire.Blocks(layout=form, offsets=packed), token)
            assert old == rows(here, at_puller, token)
    assert not any(any(row) for row in rows(here, at_puller, num_tokens))


def test_the_devices_side_is_packed_and_unpacked_by_itself():
    """The host's side of the same cache keeps every byte."""
    own, form = (wire_cases.layout(dtype, block_size=8) for dtype in ("bfloat16", "int8"))
    num_bytes = 2 * form.block_num_bytes
    cpu = torch.device("cpu")
    cache = DeviceCache(own, 5, shareable=False, device=cpu, staging_num_bytes=num_bytes)
    host = KvCache(own, 5, shareable=False, staging_num_bytes=num_bytes)
    there = wire.Blocks(layout=own, offsets=[own.block_num_bytes, 0])
    for memory in (cache.device_bytes, torch.from_numpy(host.bytes)):
        wire_cases.fill(memory, there, seed=5)
    staging = [host.staging_offset + i * form.block_num_bytes for i in range(2)]
    for side, of in ((device_wire, cache), (wire, host)):
        side.pack(of, [1, 0], form, staging)
        side.unpack(
            of, form, staging[1:], first_wire_index=1, block_table=[2, 3], first_token=9,
            end_token=15,
        )  # fmt: skip
    assert torch.equal(cache.device_bytes, torch.from_numpy(host.bytes))
    assert not cache.bytes.any()


def test_blocks_are_packed_into_staging_only():
    """A block of the cache is nobody's to overwrite."""
    own = wire_cases.layout("bfloat16", block_size=8)
    form = replace(own, dtype="int8")
    cache, _ = cache_of(own, form, num_wire=1)
    with pytest.raises(AssertionError):
        wire.pack(cache, [0], form, [own.block_num_bytes])


def test_what_a_wire_block_lacks_is_not_read():
    """Tokens before the first landed block, or after the last, are a mistake of the caller."""
    own, form = (wire_cases.layout(dtype, block_size=8) for dtype in ("bfloat16", "int8"))
    for first_token, end_token in ((7, 16), (8, 17), (12, 11)):
        with pytest.raises(AssertionError):
            wire.unpacking(
                own,
                form,
                [0],
                first_wire_index=1,
                block_table=[0, 1, 2],
                first_token=first_token,
                end_token=end_token,
            )


@pytest.mark.parametrize(
    ("holder", "puller", "asked", "chosen"),
    [
        ("bfloat16", "bfloat16", "auto", "bfloat16"),
        ("bfloat16", "int8", "auto", "int8"),
        ("bfloat16", "fp8", "auto", "fp8"),
        ("float32", "bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "auto", "bfloat16"),
        ("int8", "bfloat16", "auto", "int8"),
        ("int8", "fp8", "auto", "int8"),
        ("fp8", "int8", "auto", "fp8"),
        ("bfloat16", "bfloat16", "int8", "int8"),
        ("bfloat16", "int8", "fp8", "fp8"),
        ("bfloat16", "int8", "bfloat16", "bfloat16"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("int8", "int8", "fp8", "int8"),
        ("int8", "bfloat16", "bfloat16", "int8"),
    ],
)
def test_kv_travels_in_the_narrower_form(holder, puller, asked, chosen):
    """With the holder's block size; wider than the holder keeps it, never."""
    at_holder = wire_cases.layout(holder, block_size=16)
    at_puller = wire_cases.layout(puller, block_size=64)
    form = wire_layout_for(at_holder, at_puller, asked)
    assert form == replace(at_holder, dtype=chosen)
