"""In which form KV travels between two workers that keep it differently.

Pure: two layouts and the operator's wish in, a layout out. Wire blocks have the holder's block
size, whatever the puller's is, so that a holder packs block by block. KV never grows on the way,
and is never made narrower than both sides keep it unless somebody asked for that.
"""

from dataclasses import replace
from typing import Literal

from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout

WireDtype = Literal["auto", "bfloat16", "fp8", "int8"]


def wire_layout_for(holder: KvLayout, puller: KvLayout, asked: WireDtype) -> KvLayout:
    """The layout of wire blocks; equal to the holder's where its blocks travel as they are.

    "auto" is the puller's dtype where that is narrower: what it would not keep need not travel.
    A dtype that was asked for is taken where it is narrower than the holder's.
    """
    dtype = puller.dtype if asked == "auto" else asked
    # Scales do not count: fp8 of an int8 would round twice to save one byte in thirty.
    if DTYPE_NUM_BYTES[dtype] < DTYPE_NUM_BYTES[holder.dtype]:
        return replace(holder, dtype=dtype)
    return holder
