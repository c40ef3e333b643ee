"""The default model, pulled for real: the facts about it that the rest relies on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from coordinator.request import ChatMessage
from coordinator.tokenizer import Tokenizer
from kvrelay.model.generation_weights import load_blocks
from kvrelay.model.quant import dequantize
from kvrelay.model.spec import read_spec
from kvrelay.model.weights import load_weights
from kvrelay.store.catalog import SMOLLM2_135M_INSTRUCT
from kvrelay.store.manifest import model_digest, read_model_dir
from kvrelay.store.pull import ensure

pytestmark = pytest.mark.realmodel

DIGEST = "ae09252a50e9b6339d802b2ad64c4a6482a162da7abbc1fab7a791b409507418"
"""Of what conversion makes of the pinned file. It may change only with the conversion."""

TEXTS = [
    "What is the capital of France?",
    "  two  spaces\tand a tab\r\n\n\nlines",
    "x = 12345; y = 3.14159  # numbers fall into digits",
    "Grüße aus Köln, çà et là, Ελληνικά, Русский, العربية, हिन्दी",
    "日本語の文章と한국어 문장과中文句子。",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and \u0301 combining \ufb01",
    "def f(a, *b, **c):\n    return {**c, 'k': [a, *b]}\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "it's we'll I'D they've",
    "\x00\x07\x1b[0m\u00a0\u2028\ufeff",
]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return ensure(SMOLLM2_135M_INSTRUCT.name)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


def test_it_is_the_model_that_was_pinned(model_dir: Path) -> None:
    """Every machine converts the same bytes into the same files, so its workers pair."""
    config = read_model_dir(model_dir).config
    assert (config["vocab_size"], config["num_hidden_layers"]) == (49152, 30)
    assert model_digest(model_dir) == DIGEST


def test_its_own_blocks_are_what_its_weights_were_rounded_from(model_dir: Path) -> None:
    """Every matrix has them, of 4 bits, and the head of 8."""
    spec = read_spec(model_dir)
    weights = load_weights(model_dir, spec, dtype=torch.bfloat16)
    blocks = load_blocks(model_dir, spec)
    assert blocks.num_bytes == 96_436_224
    assert blocks.head is not None
    assert blocks.head.kind == "q8_0"
    assert torch.equal(dequantize(blocks.head).bfloat16(), weights.head)
    for made, layer in zip(blocks.layers, weights.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            matrix = getattr(made, name)
            assert matrix.kind == "q4_1"
            assert torch.equal(dequantize(matrix).bfloat16(), getattr(layer, name))


def test_its_special_tokens_are_known(tokenizer: Tokenizer) -> None:
    """The ids its authors gave them."""
    assert tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=True) == [1, 2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.vocab_size == 49152
    assert tokenizer.context_length == 8192


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    """Encoding loses nothing."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    """transformers' tokenizer of the same directory."""
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(reference: Any, tokenizer: Tokenizer, text: str) -> None:
    """The reference loads the same directory."""
    assert tokenizer.encode(text, add_special_tokens=True) == reference.encode(text)


def test_a_question_is_rendered_as_transformers_renders_it(
    reference: Any, tokenizer: Tokenizer
) -> None:
    """37 tokens, of which the template's own system prompt is most."""
    messages = [ChatMessage("user", "What is the capital of France?")]
    as_dicts = [{"role": m.role, "content": m.content} for m in messages]
    expected = reference.apply_chat_template(
        as_dicts, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.encode_chat(messages) == expected
    assert len(expected) == 37
