"""What an operator may choose for the coordinator."""

from typing import Literal

from pydantic import Field, model_validator

from kvrelay.config import HostPort, ServiceSettings


class CoordinatorConfig(ServiceSettings):
    """Checked once, here; the rest of the service trusts it."""

    model: str
    """Name of a pulled model, or a directory. Only its tokenizer and config are read."""

    listen: HostPort = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server."""

    http_listen: HostPort = "127.0.0.1:8000"
    """HOST:PORT of the HTTP front."""

    disaggregate: Literal["always", "auto", "never"] = "auto"
    """When prompts are prefilled apart from decoding. `always` refuses to serve without a
    prefill worker; `never` needs none."""

    local_prefill_max_tokens: int = Field(default=32, ge=0)
    """`auto`: prompts with at most this many uncached tokens are prefilled where they decode."""

    expect_prefill: int = Field(default=1, ge=0)
    """Prefill workers that must have joined before the first canary."""

    expect_decode: int = Field(default=1, ge=1)
    """Decode workers that must have joined before the first canary."""

    default_max_tokens: int = Field(default=1024, ge=1)
    """`max_tokens` of requests that give none, if the context leaves as many."""

    max_requests: int = Field(default=256, ge=1)
    """Requests under way at once; more are refused with RESOURCE_EXHAUSTED."""

    max_tokens_under_way: int = Field(default=1 << 20, ge=1)
    """Prompt and output tokens of all requests under way; more are refused."""

    max_attempts: int = Field(default=4, ge=1)
    """Placements tried for one request before it fails with UNAVAILABLE."""

    queue_limit_s: float = Field(default=10.0, gt=0)
    """Longest wait for a suitable worker before a request fails with UNAVAILABLE."""

    heartbeat_interval_s: float = Field(default=0.5, ge=0.05, le=60)
    """How often workers are told to report."""

    suspect_after_s: float = Field(default=3.0, gt=0)
    """A worker silent for so long is no longer a member; its requests are placed again."""

    canary_interval_s: float = Field(default=30.0, ge=1)
    """How often readiness is proved anew by a request that crosses the pool."""

    max_ledgers: int = Field(default=4096, ge=1)
    """Ended requests that `explain` remembers."""

    relief: bool = True
    """Move a running request off a decode worker on which others wait, while another has ample
    room. Requests of a worker that drains are moved in any case."""

    max_moves: int = Field(default=8, ge=1)
    """Requests that move off one draining worker at a time. More end the drain sooner, and take
    more of the steps of those that take them over."""

    drain_s: float = Field(default=30.0, ge=0)
    """How long requests under way may go on after SIGTERM."""

    @model_validator(mode="after")
    def _possible(self) -> "CoordinatorConfig":
        if self.disaggregate == "always" and self.expect_prefill < 1:
            raise ValueError("expect_prefill: must be at least 1 where disaggregate is always")
        if self.suspect_after_s < 2 * self.heartbeat_interval_s:
            raise ValueError(
                f"suspect_after_s: must be at least twice heartbeat_interval_s "
                f"({self.heartbeat_interval_s} s), is {self.suspect_after_s} s"
            )
        return self
