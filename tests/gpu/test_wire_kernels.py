"""What a device does to KV on its way, and its digest, are the host's bit for bit.

On a CUDA device, or interpreted on the CPU, as tests/gpu/test_kernels.py.
"""

import numpy as np
import pytest
import torch

from kvrelay.kernels import digest
from kvrelay.kernels import wire as wire_kernels
from kvrelay.kv import wire
from kvrelay.kv.layout import KvLayout
from tests.support import wire_cases
from tests.support.kernel_cases import DEVICE, HAS_DEVICE, IS_INTERPRETED, NEITHER

pytestmark = pytest.mark.gpu

if not (HAS_DEVICE or IS_INTERPRETED):
    pytest.skip(NEITHER, allow_module_level=True)


def assert_same_on_device(memory: torch.Tensor, what: wire.Rewrite) -> torch.Tensor:
    ours, reference = memory.to(DEVICE, copy=True), memory.clone()
    wire_kernels.rewrite(ours, what)
    wire_kernels.rewrite_reference(reference, what)
    assert torch.equal(ours.cpu(), reference)
    return reference


@pytest.mark.parametrize("target", wire_cases.DTYPES)
@pytest.mark.parametrize("source", wire_cases.DTYPES)
@pytest.mark.parametrize("block_sizes", [(8, 8), (16, 8), (8, 32)], ids=str)
@pytest.mark.parametrize("tokens", [(0, 48), (5, 43), (17, 18)], ids=str)
def test_a_rewrite_on_the_device_is_the_hosts(source, target, block_sizes, tokens):
    """Every pair of dtypes, blocks of other sizes, ranges that begin and end within blocks."""
    memory, what = wire_cases.case(
        wire_cases.layout(source, block_size=block_sizes[0]),
        wire_cases.layout(target, block_size=block_sizes[1]),
        first_token=tokens[0],
        end_token=tokens[1],
        seed=1,
    )
    assert_same_on_device(memory, what)


def every_16_bits(*, head_dim: int) -> tuple[torch.Tensor, KvLayout]:
    """Each bfloat16 that is a number, and the layout of one block of them."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = torch.where(x.isnan(), torch.zeros_like(x), x)
    layout = KvLayout(
        num_layers=1,
        block_size=x.numel() // 2 // head_dim,
        num_kv_heads=1,
        head_dim=head_dim,
        dtype="bfloat16",
    )
    return x, layout


@pytest.mark.parametrize("dtype", ["float32", "fp8", "int8"])
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_every_bfloat16_becomes_what_the_host_makes_of_it(dtype, is_shuffled):
    """Infinities, numbers too small for an exponent, and zeros of either sign."""
    x, own = every_16_bits(head_dim=64)
    if is_shuffled:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    to = KvLayout(num_layers=1, block_size=own.block_size, num_kv_heads=1, head_dim=64, dtype=dtype)
    begin = own.block_num_bytes
    memory = torch.zeros(begin + to.block_num_bytes, dtype=torch.uint8)
    memory[:begin] = x.view(torch.uint8)
    assert_same_on_device(memory, wire.packing(own, [0], to, [begin]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_fp8_is_read_as_the_host_reads_it(dtype):
    """All bytes; the two that are no number stay none."""
    of, to = (
        KvLayout(num_layers=1, block_size=8, num_kv_heads=1, head_dim=16, dtype=kind)
        for kind in ("fp8", dtype)
    )
    memory = torch.zeros(256 + to.block_num_bytes, dtype=torch.uint8)
    memory[:256] = torch.arange(256, dtype=torch.uint8)
    read = []
    for place, op in ((DEVICE, wire_kernels.rewrite), ("cpu", wire_kernels.rewrite_reference)):
        there = memory.to(place, copy=True)
        op(there, wire.packing(of, [0], to, [256]))
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        read.append(there[256:].cpu().view(kind).float().numpy())
    ours, reference = read
    assert np.isnan(ours).sum() == 2
    np.testing.assert_array_equal(ours, reference)
    np.testing.assert_array_equal(
        np.signbit(ours[ours == 0]), np.signbit(reference[reference == 0])
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_no_number_is_not_hidden():
    """A row with one such value has nothing else when it is read back from int8."""
    own, to = (wire_cases.layout(kind, block_size=8) for kind in ("bfloat16", "int8"))
    begin = own.block_num_bytes
    for bad in (torch.nan, torch.inf, -torch.inf):
        memory = torch.zeros(begin + to.block_num_bytes, dtype=torch.uint8)
        rows = memory[:begin].view(torch.bfloat16).view(-1, wire_cases.HEAD_DIM)
        rows[:] = 1.0
        rows[5, 3] = bad
        there = memory.to(DEVICE)
        wire_kernels.rewrite(there, wire.packing(own, [0], to, [begin]))
        back = wire.unpacking(
            own, to, [begin], first_wire_index=0, block_table=[0], first_token=0, end_token=8
        )
        wire_kernels.rewrite(there, back)
        read = there[:begin].cpu().view(torch.bfloat16).view(-1, wire_cases.HEAD_DIM)
        assert bool(read[5].isnan().all())
        assert not bool(read[:5].isnan().any())


SIZES = [16, 32, 48, 128, 8 * digest.TILE - 16, 8 * digest.TILE, 8 * digest.TILE + 16]
LARGE = 8 * digest.TILE * digest.TILES_PER_PROGRAM


@pytest.mark.parametrize("num_bytes", [0, *SIZES, LARGE - 16, LARGE, LARGE * 2 + 48])
def test_the_digest_of_the_device_is_the_hosts(num_bytes):
    """Ranges that fill no tile, no program, or many; that overlap; one of them twice."""
    generator = torch.Generator().manual_seed(num_bytes)
    memory = torch.randint(
        0, 256, (num_bytes * 3 + 64,), dtype=torch.uint8, generator=generator
    ).to(DEVICE)
    offsets = [0, 16, 0, num_bytes * 2 + 64]
    ours = digest.lanes64_blocks(memory, offsets, num_bytes)
    reference = digest.lanes64_blocks_reference(memory, offsets, num_bytes)
    assert torch.equal(ours, reference)
    assert ours[0] == ours[2]
    data = memory.cpu().numpy()
    assert digest.unsigned(ours)[1] == digest.lanes64(data[16 : 16 + num_bytes])


def test_no_ranges_have_no_digests():
    """Nothing is launched."""
    assert digest.unsigned(digest.lanes64_blocks(torch.zeros(16, dtype=torch.uint8), [], 16)) == []
