"""The shape of KV in memory: what two workers must agree on before a byte moves.

KV may be kept in fewer bytes than it was computed with. "fp8" is e4m3: numbers beyond 448 become
448, and nothing else is stored. "int8" has one bfloat16 scale per layer, K or V, slot and head: a
number is the int8 beside it times the scale.
"""

from dataclasses import dataclass
from typing import Final

DTYPE_NUM_BYTES: Final = {"bfloat16": 2, "float32": 4, "fp8": 1, "int8": 1}
"""Of one value, scales apart."""

QUANTIZED: Final = frozenset({"fp8", "int8"})

SCALE_NUM_BYTES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """One block is `block_size` token slots of all layers, K and V, in one run of bytes.

    A block is values, `[num_layers, 2, block_size, num_kv_heads, head_dim]`, and after them for
    int8 their scales, `[num_layers, 2, block_size, num_kv_heads]`.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in DTYPE_NUM_BYTES, self.dtype
        assert min(self.num_layers, self.block_size, self.num_kv_heads, self.head_dim) > 0

    @property
    def is_quantized(self) -> bool:
        return self.dtype in QUANTIZED

    @property
    def has_scales(self) -> bool:
        return self.dtype == "int8"

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of a block's values."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def scales_shape(self) -> tuple[int, int, int, int]:
        """Of a block's scales, where there are any."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads)

    @property
    def values_num_bytes(self) -> int:
        """Of one block, and where its scales begin."""
        layers, kv, slots, heads, dim = self.block_shape
        return layers * kv * slots * heads * dim * DTYPE_NUM_BYTES[self.dtype]

    @property
    def block_num_bytes(self) -> int:
        """Scales included."""
        if not self.has_scales:
            return self.values_num_bytes
        layers, kv, slots, heads = self.scales_shape
        return self.values_num_bytes + layers * kv * slots * heads * SCALE_NUM_BYTES

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` slots need; the last may be partly filled."""
        return -(-num_tokens // self.block_size)
