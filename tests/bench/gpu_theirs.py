"""`transformers`' continuous batching on the same work, with the same shape of model."""

import inspect
import time

import torch
import transformers

from kvrelay.model.spec import ModelSpec


def model_of(spec: ModelSpec, device: torch.device) -> transformers.PreTrainedModel:
    """Random weights: what is measured is time."""
    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def throughput(
    model: transformers.PreTrainedModel,
    prompts: list[tuple[int, ...]],
    *,
    output_tokens: int,
    repeats: int,
) -> tuple[float, ...]:
    """Output tokens per second of requests that all come at once; the first run is warm-up."""
    config = transformers.GenerationConfig(
        max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    inputs = [list(ids) for ids in prompts]
    # Its start and its warm-up are not what is measured, so one manager serves all runs.
    known = inspect.signature(model.generate_batch).parameters
    options = {"persistent_manager": True} if "persistent_manager" in known else {}
    rates = []
    try:
        for _ in range(repeats + 1):
            started_s = time.perf_counter()
            outputs = model.generate_batch(inputs=inputs, generation_config=config, **options)
            elapsed_s = time.perf_counter() - started_s
            num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
            if num_tokens != len(prompts) * output_tokens:
                raise RuntimeError(f"{num_tokens} tokens of {len(prompts)} * {output_tokens}")
            rates.append(num_tokens / elapsed_s)
    finally:
        if options:
            model.destroy_cached_continuous_batching_manager()
    return tuple(rates[1:])
