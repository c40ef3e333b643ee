"""A prefill and a decode worker that share one GPU, as processes of a real deployment."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.support.kernel_cases import HAS_DEVICE

HAS_GRPC = importlib.util.find_spec("grpc") is not None

if HAS_GRPC:
    from tests.support.asking import Ask, deployed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.realmodel,
    pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device and triton"),
    pytest.mark.skipif(not HAS_GRPC, reason="needs all of kvrelay's dependencies"),
]

CLOSE_LOGITS = 0.5
"""As tests/e2e/test_tokens.py has it for bfloat16."""


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("PREFILL", "DECODE"):
        monkeypatch.setenv(f"KVRELAY_{role}_DEVICE", "cuda")
        monkeypatch.setenv(f"KVRELAY_{role}_MAX_CHUNK_TOKENS", "64")


@pytest.fixture
def asks(real_model: Path) -> "list[Ask]":
    from tests.support.prompts import prompts

    chosen = prompts(real_model)[::6]
    greedy = [Ask(prompt_ids, 24) for prompt_ids in chosen]
    sampled = [Ask(prompt_ids, 24, temperature=0.9, seed=7) for prompt_ids in chosen[:5]]
    return greedy + sampled


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("on_cuda")
async def test_tokens_do_not_depend_on_the_handoff_or_the_batch(real_model, asks, tmp_path):
    """Through host memory by either transport, one at a time and all at once; and every greedy
    token is one that `transformers` finds as likely as the likeliest."""
    said = {}
    for name, flags, at_once in (
        ("handed", ("--disaggregate", "always"), 1),
        ("together", ("--disaggregate", "always"), 8),
        ("stream", ("--disaggregate", "always", "--transport", "stream"), 8),
        ("alone", ("--disaggregate", "never"), 8),
    ):
        async with deployed(real_model, tmp_path / name, *flags) as (it, asker):
            answers = await asker.all(asks, at_once=at_once)
            said[name] = [answer.token_ids for answer in answers]
            assert "numerics" in it.logs()
            assert "rows-vary" not in it.logs()
    assert said["together"] == said["handed"]
    assert said["stream"] == said["handed"]
    assert said["alone"] == said["handed"]
    _require_likely(real_model, asks, said["handed"])


def _require_likely(model_dir: Path, asks: "list[Ask]", said: list[list[int]]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    num_far, num_all = 0, 0
    for ask, token_ids in zip(asks, said, strict=True):
        if ask.temperature > 0:
            continue
        row = torch.tensor([[*ask.prompt_ids, *token_ids[:-1]]])
        with torch.inference_mode():
            logits = model(row).logits[0, len(ask.prompt_ids) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        num_far += int((logits.amax(dim=1) - chosen > CLOSE_LOGITS).sum())
        num_all += len(token_ids)
    assert num_far <= num_all * 0.01, json.dumps({"far": num_far, "of": num_all})
