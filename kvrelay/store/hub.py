"""Fetching a model from the Hugging Face hub, where it is installed and reachable."""

import importlib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelInvalid, PeerUnavailable
from kvrelay.store.hf_dir import SMALL_FILES
from kvrelay.store.progress import Progress

_WANTED = (*SMALL_FILES, "*.safetensors")


def fetch(repo_id: str, into: Path, *, progress: Progress) -> str:
    """Download `repo_id` (`org/name`) into `into`; returns the commit it was.

    Raises:
        ModelInvalid: the hub extra is not installed, or the hub has no such model.
        PeerUnavailable: the hub cannot be reached.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        hub_errors = importlib.import_module("huggingface_hub.errors")
        hub_bar = importlib.import_module("huggingface_hub.utils").tqdm
    except ImportError as error:
        raise ModelInvalid(
            repo_id, "is a hub id, which needs the hub extra: pip install 'kvrelay[hub]'"
        ) from error
    not_there = (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError)
    # Its bases are the errors of the HTTP client underneath, which differs between versions.
    http_errors = hub_errors.HfHubHTTPError.__bases__
    api = hub.HfApi()
    progress.note(f"asking the hub for {repo_id}")
    try:
        info = api.model_info(repo_id, timeout=30.0, files_metadata=True)
        progress.begin("downloading", total_bytes=_num_bytes(info.siblings or ()))
        api.snapshot_download(
            repo_id,
            revision=info.sha,
            local_dir=into,
            allow_patterns=list(_WANTED),
            tqdm_class=_bar_into(progress, hub_bar),
        )
    except not_there as error:
        raise ModelInvalid(
            repo_id, "the hub has no such model, or it needs a login: hf auth login"
        ) from error
    except (*http_errors, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(repo_id, error) from error
    return str(info.sha)


def _num_bytes(siblings: Iterable[Any]) -> int:
    """Of the files that are wanted, as far as the hub says how long they are."""
    return sum(
        file.size or 0
        for file in siblings
        if any(fnmatch(file.rfilename, pattern) for pattern in _WANTED)
    )


def _bar_into(progress: Progress, hub_bar: Any) -> type:
    """The hub's own kind of bar, drawing nothing: its bytes go to `progress`."""

    class Bar(hub_bar):  # type: ignore[misc]
        monitor_interval = 0  # nothing is drawn, so no thread need refresh it

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # One bar counts the bytes of all files; others count files, or the same bytes again.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts and n:
                progress.advance(int(n))

    return Bar


def _unreachable(repo_id: str, error: Exception) -> PeerUnavailable:
    return PeerUnavailable(
        f"{repo_id} could not be fetched from the hub ({type(error).__name__}); check the "
        "network, or pull a directory or GGUF file you have: kvrelay pull PATH",
        repo_id=repo_id,
    )
