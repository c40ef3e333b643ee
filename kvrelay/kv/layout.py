"""The shape of KV in memory: what two workers must agree on before a byte moves."""

from dataclasses import dataclass

DTYPE_NUM_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """One block is `block_size` token slots of all layers, K and V, in one run of bytes.

    A cache is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` of `dtype`.
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
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_num_bytes(self) -> int:
        layers, kv, slots, heads, dim = self.block_shape
        return layers * kv * slots * heads * dim * DTYPE_NUM_BYTES[self.dtype]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` slots need; the last may be partly filled."""
        return -(-num_tokens // self.block_size)
