"""Which model to serve, fetched first if it is a known one that is not here yet."""

from pathlib import Path

from rich.console import Console

from kvrelay.cli import pull
from kvrelay.store.catalog import KNOWN_MODELS
from kvrelay.store.manifest import models_dir, resolve_model


def ensure(name_or_dir: str, *, console: Console) -> Path:
    """The directory of a model.

    Raises:
        ModelInvalid: there is no such model, or it is damaged.
        PeerUnavailable: it could not be downloaded.
    """
    if name_or_dir in KNOWN_MODELS and not (models_dir() / name_or_dir).is_dir():
        return pull.fetch(name_or_dir, name=None, force=False, console=console).path
    return resolve_model(name_or_dir)
