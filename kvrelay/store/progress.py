"""How a long pull tells what it is doing, without knowing who watches."""

from typing import Protocol


class Progress(Protocol):
    """One stage at a time: `begin` names it, `advance` moves it, `note` says a line."""

    def begin(self, stage: str, *, total_bytes: int) -> None:
        """Start a stage of `total_bytes`; whatever ran before is over."""
        ...

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more of the current stage are done."""
        ...

    def note(self, message: str) -> None:
        """Something worth one line."""
        ...


class Silent:
    """A `Progress` nobody watches."""

    def begin(self, stage: str, *, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass
