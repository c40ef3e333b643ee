"""What an operator may choose for one decode worker."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from kvrelay.transfer.chaos_spec import ChaosSpec, parse_chaos
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.worker.settings import WorkerSettings


def _chaos(text: str) -> str:
    if text:
        parse_chaos(text)
    return text


class DecodeConfig(WorkerSettings):
    """Checked once, here; the rest of the service trusts it."""

    max_landings: int = Field(default=256, ge=1)
    """Handoffs under way at once; more are refused with QUEUE_FULL."""

    batch_mib: int = Field(default=32, ge=1)
    """Most KV fetched from a holder at a time. Smaller verifies earlier."""

    wire_dtype: WireDtype = "auto"
    """In which form KV comes. `auto`: as its holder has it, or as we keep it if that is narrower.
    fp8 and int8: half the bytes of bfloat16, and logits change a little. bfloat16: as the holder
    has it."""

    landing_mib: int = Field(default=64, ge=1)
    """Memory for KV that comes in another form than it is kept in, taken when it is first used."""

    release_timeout_s: float = Field(default=10.0, gt=0)
    """A holder that does not confirm its hold for so long is given up."""

    chaos: Annotated[str, AfterValidator(_chaos)] = ""
    """For developers: makes pulls go wrong on purpose, e.g. corrupt=0.05,drop=0.1,seed=7. Tokens
    stay right; requests get slower, and fail where KV arrives corrupt twice."""

    @model_validator(mode="after")
    def _can_travel(self) -> "DecodeConfig":
        is_float32 = self.dtype == "float32" and self.kv_dtype == "auto"
        if is_float32 and self.wire_dtype != "auto":
            raise ValueError(f"wire_dtype: is {self.wire_dtype}, but float32 KV travels as it is")
        return self

    @property
    def chaos_spec(self) -> ChaosSpec | None:
        """What `chaos` says, if anything."""
        return parse_chaos(self.chaos) if self.chaos else None
