"""Device runners over small models, on whatever stands for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.kernels.matrix import Kind
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.model.cuda_device import Device, Stand
from kvrelay.model.cuda_runner import CudaRunner
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import Weights


@contextmanager
def cuda_runner_of(
    spec: ModelSpec,
    weights: Weights,
    *,
    device: Device | None = None,
    block_size: int = 16,
    num_blocks: int = 400,
    kind: Kind = "plain",
    max_rows: int = 128,
) -> Iterator[tuple[CudaRunner, DeviceCache]]:
    """A runner and its cache, which is closed at the end."""
    device = device or Stand()
    layout = KvLayout(
        num_layers=spec.num_layers,
        block_size=block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=str(weights.dtype).removeprefix("torch."),
    )
    cache = DeviceCache(layout, num_blocks, shareable=True, device=device.torch_device)
    try:
        yield CudaRunner(spec, weights, cache, device, kind=kind, max_rows=max_rows), cache
    finally:
        cache.close()
