"""What an operator may choose for one decode worker."""

from pydantic import Field

from kvrelay.worker.settings import WorkerSettings


class DecodeConfig(WorkerSettings):
    """Checked once, here; the rest of the service trusts it."""

    max_landings: int = Field(default=256, ge=1)
    """Handoffs under way at once; more are refused with QUEUE_FULL."""

    batch_mib: int = Field(default=32, ge=1)
    """Most KV fetched from a holder at a time. Smaller verifies earlier."""

    release_timeout_s: float = Field(default=10.0, gt=0)
    """A holder that does not confirm its hold for so long is given up."""
