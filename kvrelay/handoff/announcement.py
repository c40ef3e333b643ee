"""What a holder tells its puller of a hold, as values."""

from dataclasses import dataclass

from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId


@dataclass(frozen=True, slots=True)
class Opened:
    """The hold exists, how large it is, and in which form its blocks lie."""

    num_tokens: int
    num_blocks: int
    wire_layout: KvLayout
    is_running: bool


@dataclass(frozen=True, slots=True)
class WireBlock:
    """A block as it is moved."""

    block_id: BlockId
    generation: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class BlockRun:
    """More blocks are ready; runs follow each other without a gap."""

    first_index: int
    blocks: tuple[WireBlock, ...]


@dataclass(frozen=True, slots=True)
class DigestRun:
    """Digests of blocks announced before; runs follow each other without a gap."""

    first_index: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """Everything is ready. The digest binds the blocks to the tokens."""

    output_ids: tuple[int, ...]
    num_tokens: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What there is to tell a puller now, in the order of these fields; at least one of them."""

    opened: Opened | None = None
    blocks: BlockRun | None = None
    digests: DigestRun | None = None
    completed: Completed | None = None

    def __bool__(self) -> bool:
        return self != Announcement()
