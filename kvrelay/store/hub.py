"""Fetching a model from the Hugging Face hub, where it is installed and reachable."""

import importlib
from pathlib import Path

from kvrelay.errors import ModelInvalid, PeerUnavailable
from kvrelay.store.hf_dir import SMALL_FILES
from kvrelay.store.progress import Progress


def fetch(repo_id: str, into: Path, *, progress: Progress) -> str:
    """Download `repo_id` (`org/name`) into `into`; returns the commit it was.

    Raises:
        ModelInvalid: the hub extra is not installed, or the hub has no such model.
        PeerUnavailable: the hub cannot be reached.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        hub_errors = importlib.import_module("huggingface_hub.errors")
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
        commit = str(api.model_info(repo_id, timeout=30.0).sha)
        api.snapshot_download(
            repo_id,
            revision=commit,
            local_dir=into,
            allow_patterns=[*SMALL_FILES, "*.safetensors"],
        )
    except not_there as error:
        raise ModelInvalid(
            repo_id, "the hub has no such model, or it needs a login: hf auth login"
        ) from error
    except (*http_errors, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(repo_id, error) from error
    return commit


def _unreachable(repo_id: str, error: Exception) -> PeerUnavailable:
    return PeerUnavailable(
        f"{repo_id} could not be fetched from the hub ({type(error).__name__}); check the "
        "network, or pull a directory or GGUF file you have: kvrelay pull PATH",
        repo_id=repo_id,
    )
