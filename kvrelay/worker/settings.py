"""What an operator may choose for any worker; each role adds its own."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from kvrelay.config import HostPort, ServiceSettings


class WorkerSettings(ServiceSettings):
    """Checked once, here."""

    model: str
    """Name of a pulled model, or a directory."""

    coordinator: HostPort = "127.0.0.1:50051"
    """HOST:PORT of the coordinator whose pool this worker joins, for ever if need be."""

    worker_id: Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]{1,64})?$")] = ""
    """Stable name in the pool. Empty: made up at each start."""

    threads: int = Field(default=0, ge=0, le=1024)
    """Most CPU threads that compute. 0: as many as there are cores, shared with those workers
    of this user that compute at the same time."""

    nice: int = Field(default=0, ge=0, le=19)
    """How far this worker's computing stands back where cores are short, as nice(1) has it. For
    prefill workers on machines with more workers than cores: a late token is felt more than a
    late prompt. But it stands back for everybody, not for decode workers alone."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, and of KV unless `kv_dtype` says otherwise. Equal in all workers of a pool."""

    kv_dtype: Literal["auto", "bfloat16", "fp8", "int8"] = "auto"
    """What KV is kept in. `auto`: `dtype`. fp8 and int8 take half of bfloat16's memory and change
    logits a little; on the CPU only."""

    packs_to: Literal["auto", "none", "fp8", "int8"] = "auto"
    """What KV can be packed to for pullers that ask for fewer bytes. `auto`: on the CPU to both, in
    memory that is taken when it is first used; on a device to nothing, as its memory is taken at
    the start: half as much again as KV has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where this worker computes. `auto`: on a CUDA device where there is one that can, else on
    the CPU. A device's KV takes as much again in host memory, where transports find it."""

    cpu_engine: Literal["auto", "native", "torch"] = "auto"
    """What computes on a CPU. `native`: the compiled engine, which wants AVX-512 with bfloat16;
    `torch`: slower, and for any CPU. `auto`: native where it can. Each gives other bits, so all
    workers of a pool need the same."""

    generation_weights: Literal["auto", "bfloat16", "fp8", "int8", "int4"] = "auto"
    """What generated tokens are computed with; prompts are always computed with `dtype`.
    `auto`: on the CPU a GGUF's own 4-bit and 8-bit blocks where the model has them, else
    bfloat16. fp8 (CUDA only), int8 and int4 are made of the weights at start. Equal in all
    workers of a pool."""

    block_size: Literal[8, 16, 32, 64] = 16
    """Tokens per KV block. Workers of a pool may differ; blocks are cut or joined as they land."""

    num_blocks: int = Field(default=0, ge=0)
    """KV blocks of this worker. 0: as many as fit into `kv_memory_mib`."""

    kv_memory_mib: int = Field(default=256, ge=1)
    """Memory for KV if `num_blocks` is 0."""

    budget_tokens: int = Field(default=256, ge=1)
    """Most tokens in one step. Larger raises throughput, and the time between tokens of
    whoever decodes beside a long prompt."""

    max_chunk_tokens: int = Field(default=256, ge=1)
    """Most tokens of one prompt in one step. Smaller lets KV travel earlier."""

    max_sequences: int = Field(default=32, ge=1)
    """Most sequences in one step."""

    max_waiting: int = Field(default=1024, ge=1)
    """Sequences waiting for blocks before new ones are refused with QUEUE_FULL."""

    transport: Literal["auto", "shm", "nixl", "cuda_ipc", "nccl", "stream"] = "auto"
    """How KV may travel. `auto` uses the best that a pair of workers has in common. A name has
    that one alone: a worker that cannot have it here does not start."""

    hold_s: float = Field(default=30.0, gt=0)
    """How long finished KV waits for a puller to connect before its blocks are freed."""

    unclaimed_hold_s: float = Field(default=10.0, gt=0)
    """How long a pull may wait for its hold to begin."""

    max_expected_pulls: int = Field(default=1024, ge=1)
    """Pulls that may wait so at once; more are refused with QUEUE_FULL."""

    drain_s: float = Field(default=30.0, ge=0)
    """How long requests under way may go on after SIGTERM."""

    @model_validator(mode="before")
    @classmethod
    def _number_block_size(cls, given: object) -> object:
        """Choices are compared as they are, and text from a flag is not yet a number."""
        if isinstance(given, dict) and str(given.get("block_size", "")).isdigit():
            return {**given, "block_size": int(given["block_size"])}
        return given

    @model_validator(mode="after")
    def _possible(self) -> "WorkerSettings":
        if self.budget_tokens < self.max_sequences:
            raise ValueError(
                f"budget_tokens: {self.budget_tokens} is less than max_sequences, "
                f"{self.max_sequences}: every sequence needs a token in each step"
            )
        return self
