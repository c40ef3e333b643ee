"""What an operator may choose for one prefill worker."""

from pydantic import Field

from kvrelay.worker.settings import WorkerSettings


class PrefillConfig(WorkerSettings):
    """Checked once, here; the rest of the service trusts it."""

    hold_s: float = Field(default=30.0, gt=0)
    """How long finished KV waits for a puller to connect before its blocks are freed."""

    unclaimed_hold_s: float = Field(default=10.0, gt=0)
    """How long a pull may wait for its prompt to be submitted."""

    max_expected_pulls: int = Field(default=1024, ge=1)
    """Pulls that may wait so at once; more are refused with QUEUE_FULL."""
