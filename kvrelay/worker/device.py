"""Where a worker computes: settled once, at its start, by what is asked for and what there is.

Everything of CUDA is imported here and only when it is wanted: loading Triton takes a moment.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from kvrelay.config import SettingsError
from kvrelay.kv.layout import KvLayout
from kvrelay.model.spec import ModelSpec
from kvrelay.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from kvrelay.kernels.matrix import Kind
    from kvrelay.kv.device_cache import DeviceCache
    from kvrelay.model.cuda_runner import CudaRunner


def chosen_device(settings: WorkerSettings) -> Literal["cpu", "cuda"]:
    """What `settings.device` comes to here.

    Raises:
        SettingsError: it asks for what this machine does not have.
    """
    is_fp8 = settings.generation_weights == "fp8"
    reason = "device is cpu" if settings.device == "cpu" else _why_not_cuda(settings.dtype)
    if reason is None:
        if is_fp8 and torch.cuda.get_device_capability() < (8, 9):
            raise SettingsError(
                f"generation_weights = fp8: {torch.cuda.get_device_name()} does not know e4m3"
            )
        return "cuda"
    if settings.device == "cuda":
        raise SettingsError(f"device = cuda: {reason}")
    if is_fp8:
        raise SettingsError(f"generation_weights = fp8 needs a CUDA device: {reason}")
    return "cpu"


def load_on_cuda(
    model_dir: Path,
    spec: ModelSpec,
    layout: KvLayout,
    settings: WorkerSettings,
    *,
    num_blocks: int,
    staging_num_bytes: int,
) -> "tuple[CudaRunner, DeviceCache]":
    """A runner on the device and its cache, which the caller closes.

    Raises:
        ModelInvalid: see `load_weights`.
        SettingsError: the device's memory is too small for weights and KV.
    """
    from kvrelay.kv.cache import TORCH_DTYPES
    from kvrelay.kv.device_cache import DeviceCache
    from kvrelay.model.cuda_device import Cuda
    from kvrelay.model.cuda_runner import CudaRunner
    from kvrelay.model.weights import load_weights

    weights = load_weights(model_dir, spec, dtype=TORCH_DTYPES[layout.dtype])
    device = Cuda()
    cache: DeviceCache | None = None
    try:
        cache = DeviceCache(
            layout,
            num_blocks,
            shareable=settings.transport != "stream",
            device=device.torch_device,
            staging_num_bytes=staging_num_bytes,
        )
        runner = CudaRunner(
            spec,
            weights,
            cache,
            device,
            kind=_kind(settings.generation_weights),
            max_rows=settings.max_sequences,
        )
    except torch.cuda.OutOfMemoryError as error:
        if cache is not None:
            cache.close()
        raise SettingsError(
            f"kv_memory_mib = {settings.kv_memory_mib}: weights of {weights.num_bytes} bytes and "
            f"KV of {num_blocks * layout.block_num_bytes} do not fit on the device"
        ) from error
    return runner, cache


def _why_not_cuda(dtype: str) -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if dtype != "bfloat16":
        return f"dtype {dtype} is not computed with there, bfloat16 is"
    from kvrelay.model.cuda_device import why_not_cuda

    return why_not_cuda()


def _kind(choice: Literal["auto", "bfloat16", "fp8", "int8", "int4"]) -> "Kind":
    """A GGUF's own blocks are the CPU's business; here `auto` is bfloat16."""
    if choice == "auto" or choice == "bfloat16":
        return "plain"
    return choice
