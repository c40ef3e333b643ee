"""Every supported family computes what `transformers` computes on the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvrelay.kv.cache import TORCH_DTYPES, KvCache
from kvrelay.model.load import CpuEngine, ModelRunner, layout_of, load_runner
from kvrelay.model.spec import read_spec
from kvrelay.model.weights import load_weights
from kvrelay.native.library import why_not
from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf
from tests.support.tiny_model import generated, prompt, runner_of, table, tokens

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama3_rope() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def yarn_rope() -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def linear_rope() -> dict[str, Any]:
    return {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama2": transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=llama3_rope()),
    "llama-linear": transformers.LlamaConfig(**SIZES, rope_parameters=linear_rope()),
    "llama-yarn": transformers.LlamaConfig(**SIZES, rope_parameters=yarn_rope()),
    "llama-biased": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=24),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=40),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2.5-tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "smollm2": transformers.LlamaConfig(
        **SIZES
        | {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-5,
        },
        tie_word_embeddings=True,
    ),
}

PROMPT = tokens(1, 150)
NUM_OUTPUT = 32


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """A float32 model of random weights, biases and norms included."""
    transformers.utils.logging.disable_progress_bar()  # its bars leave a thread behind
    config = CONFIGS[request.param]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.fixture
def model_dir(theirs: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    return tmp_path


def their_logits(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


@contextmanager
def loaded(model_dir: Path, dtype: str, engine: CpuEngine = "auto") -> Iterator[ModelRunner]:
    spec = read_spec(model_dir)
    layout = layout_of(spec, dtype=dtype, block_size=16)
    cache = KvCache(layout, 12, shareable=False)
    runner, _ = load_runner(
        model_dir, spec, cache, engine=engine, generation_weights="auto", num_threads=1
    )
    yield runner
    cache.close()


def assert_same_logits_and_tokens(
    model: transformers.PreTrainedModel, model_dir: Path, ids: tuple[int, ...]
) -> None:
    """Logits of the prompt's last row, then greedy tokens through the generation path."""
    with loaded(model_dir, "float32") as runner:
        blocks = table(0, 12)
        (ours,) = runner.step_logits([prompt(ids, 0, blocks)])
        torch.testing.assert_close(ours, their_logits(model, list(ids))[-1], atol=1e-4, rtol=1e-4)
        output = runner.step([prompt(ids, 0, blocks)])
        while len(output) < NUM_OUTPUT:
            last = output[-1]
            assert last is not None
            output += runner.step([generated([last], len(ids) + len(output) - 1, blocks)])
    teacher = their_logits(model, [*ids, *[token for token in output if token is not None]])
    assert output == teacher[len(ids) - 1 : -1].argmax(-1).tolist()


def test_float32_logits_and_tokens_are_those_of_transformers(
    theirs: transformers.PreTrainedModel, model_dir: Path
) -> None:
    """Logits of the prompt's last row, then 32 greedy tokens through the generation path."""
    assert_same_logits_and_tokens(theirs, model_dir, PROMPT)


@pytest.mark.parametrize(
    "engine",
    [
        "torch",
        pytest.param(
            "native", marks=pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
        ),
    ],
)
def test_bfloat16_logits_are_near(
    theirs: transformers.PreTrainedModel, model_dir: Path, engine: CpuEngine
) -> None:
    """No farther from float32 than transformers' own bfloat16, give or take.

    Of a prompt's last row, and of a generated one's after it.
    """
    exact = their_logits(theirs, list(PROMPT))[-1]
    their_bfloat16 = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    their_error = (their_logits(their_bfloat16, list(PROMPT))[-1] - exact).abs().max()
    bound = 1.5 * their_error + 0.01 * exact.abs().max()
    blocks, last = table(0, 12), len(PROMPT) - 1
    with loaded(model_dir, "bfloat16", engine) as runner:
        (whole,) = runner.step_logits([prompt(PROMPT, 0, blocks)])
        (stepped,) = runner.step_logits([generated(PROMPT[last:], last, blocks)])
    assert (whole - exact).abs().max() <= bound
    assert (stepped - exact).abs().max() <= bound


def test_a_sharded_checkpoint_is_the_same_model(
    theirs: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    """Split by transformers itself into many small files."""
    for name, limit in (("whole", "1GB"), ("shards", "50KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=limit)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (
        load_weights(path, read_spec(path), dtype=TORCH_DTYPES["float32"])
        for path in (tmp_path / "whole", tmp_path / "shards")
    )
    spec = read_spec(tmp_path / "whole")
    with runner_of(spec, whole) as (a, _), runner_of(spec, shards) as (b, _):
        rows = [prompt(PROMPT, 0, table(0, 12))]
        assert torch.equal(a.step_logits(rows), b.step_logits(rows))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_converted_gguf_file_computes_what_transformers_computes(
    tmp_path: Path, arch: str
) -> None:
    """Written from a model of `transformers`, converted as `kvrelay pull` does, and run."""
    theirs = gguf_twin(arch)
    weights = {name: values.numpy() for name, values in theirs.state_dict().items()}
    weights.pop("lm_head.weight")
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", arch, weights=weights)
    gguf_model.convert(source, tmp_path, progress=Silent())

    assert_same_logits_and_tokens(theirs, tmp_path, tokens(2, 40, len(tiny_gguf.TOKENS)))


def gguf_twin(arch: str) -> transformers.PreTrainedModel:
    """A tied model of the size of `tiny_gguf`, of weights that bfloat16 holds exactly."""
    family = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[arch]
    config = family(
        hidden_size=tiny_gguf.HIDDEN,
        intermediate_size=tiny_gguf.INNER,
        num_hidden_layers=tiny_gguf.NUM_LAYERS,
        num_attention_heads=tiny_gguf.NUM_HEADS,
        num_key_value_heads=tiny_gguf.NUM_KV_HEADS,
        head_dim=tiny_gguf.HEAD_DIM,
        vocab_size=len(tiny_gguf.TOKENS),
        max_position_embeddings=tiny_gguf.CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    stored = {name: torch.from_numpy(v) for name, v in tiny_gguf.random_weights(arch).items()}
    missing, spare = model.load_state_dict(stored, strict=False)
    assert not spare
    assert set(missing) <= {"lm_head.weight"}
    return model
