"""What an operator may choose for one prefill worker."""

from kvrelay.worker.settings import WorkerSettings


class PrefillConfig(WorkerSettings):
    """Checked once, here; the rest of the service trusts it."""
