"""Which processes make a deployment, and their command lines.

Pure: the services' settings are the interface, nothing of them is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """One coordinator and two pools on this machine. None means: the service's default."""

    model: str
    """Name or directory, as the services take it."""

    num_prefill: int = 1
    num_decode: int = 1
    num_threads: int = 0
    """At most, of each worker. 0: as the cores allow."""

    disaggregate: str = "auto"
    transport: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    wire_dtype: str | None = None
    """Of what decode workers pull."""

    block_size: int | None = None
    num_blocks: int | None = None
    drain_s: float = 30.0
    chaos: str = ""
    """What goes wrong on purpose with the decode workers' pulls; empty: nothing."""

    def coordinator(self, *, listen: str, http_listen: str) -> tuple[str, ...]:
        """Arguments to Python that start the coordinator."""
        return (
            *("-m", "coordinator", "--model", self.model),
            *("--listen", listen, "--http-listen", http_listen),
            *("--disaggregate", self.disaggregate),
            *("--expect-prefill", str(self.num_prefill)),
            *("--expect-decode", str(self.num_decode)),
            *("--drain-s", str(self.drain_s)),
        )

    def worker(self, role: str, index: int, *, coordinator: str) -> tuple[str, ...]:
        """Arguments to Python that start worker number `index` of `role`."""
        # A flag overrules the environment, where each role has settings of its own.
        optional = {
            "--transport": self.transport,
            "--dtype": self.dtype,
            "--kv-dtype": self.kv_dtype,
            "--wire-dtype": self.wire_dtype if role == "decode" else None,
            "--block-size": self.block_size,
            "--num-blocks": self.num_blocks,
        }
        return (
            *("-m", f"{role}_svc", "--model", self.model, "--coordinator", coordinator),
            *("--worker-id", f"{role}-{index}", "--listen", "127.0.0.1:0"),
            *("--threads", str(self.num_threads), "--drain-s", str(self.drain_s)),
            *(("--chaos", self.chaos) if self.chaos and role == "decode" else ()),
            *(word for flag, v in optional.items() if v is not None for word in (flag, str(v))),
        )

    @property
    def workers(self) -> tuple[tuple[str, int], ...]:
        """Role and index of each worker."""
        pools = (("prefill", self.num_prefill), ("decode", self.num_decode))
        return tuple((role, i) for role, count in pools for i in range(count))
