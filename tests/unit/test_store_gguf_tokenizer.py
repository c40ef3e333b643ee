"""Tokenizers rebuilt from GGUF metadata split and join text as their originals do."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from kvrelay.errors import ModelInvalid
from kvrelay.store.gguf_file import GgufFile
from kvrelay.store.gguf_tokenizer import (
    BYTE_LEVEL_RULES,
    SPACE,
    TokenType,
    Vocabulary,
    build_tokenizer,
    merges_of_scores,
)
from tests.support import tiny_gguf

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

PIECES = [SPACE, *"abc", "ab", "bc", SPACE + "a", "abc", "ca", SPACE + "ab"]
SCORES = [-20.0, -21.0, -22.0, -23.0, -3.0, -1.0, -2.0, -4.0, -5.0, -6.0]


@pytest.fixture(scope="module", params=BYTE_LEVEL_RULES)
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    file = GgufFile(tiny_gguf.write_gguf(path, pre=request.param))
    return request.param, build_tokenizer(file)


@given(text=TEXT)
def test_any_text_comes_back_whole(byte_level: tuple[str, Tokenizer], text: str) -> None:
    """Byte-level vocabularies lose nothing, whatever their splitting rule."""
    rule, tokenizer = byte_level
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    expected = normalizers.NFC().normalize_str(text) if rule == "qwen2" else text
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_control_tokens_are_special_and_own_ones_are_not(byte_level: tuple) -> None:
    """The token types of the file decide what `skip_special_tokens` drops."""
    _, tokenizer = byte_level
    ids = tokenizer.encode("<|im_start|><tool>hello<|im_end|>", add_special_tokens=False).ids
    own = tiny_gguf.TOKENS.index("<tool>")
    assert ids == [1, own, tiny_gguf.TOKENS.index("hello"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>hello"


@pytest.mark.parametrize(("rule", "num_tokens"), [("smollm", 2), ("qwen2", 2), ("llama-bpe", 1)])
def test_digits_are_split_by_the_rule(tmp_path: Path, rule: str, num_tokens: int) -> None:
    """SmolLM and Qwen keep digits apart, Llama 3 takes up to three together."""
    tokenizer = build_tokenizer(GgufFile(tiny_gguf.write_gguf(tmp_path / "m.gguf", pre=rule)))
    assert len(tokenizer.encode("12", add_special_tokens=False).ids) == num_tokens


def test_an_unknown_splitting_rule_is_refused_by_name(tmp_path: Path) -> None:
    """Guessing would give other ids than the model was trained on."""
    file = GgufFile(tiny_gguf.write_gguf(tmp_path / "m.gguf", pre="tekken"))
    with pytest.raises(ModelInvalid, match="splitting rule tekken is not one of"):
        build_tokenizer(file)


def sentencepiece_reference(text: str) -> list[int]:
    """Join the neighbours whose union scores best, leftmost first, until none can."""
    pieces = list(SPACE + text.replace(" ", SPACE))
    while True:
        joined = [
            (-SCORES[PIECES.index(a + b)], i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in PIECES
        ]
        if not joined:
            return [PIECES.index(piece) for piece in pieces]
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@given(st.text("abc ", min_size=1, max_size=30))
def test_merges_of_scores_join_as_sentencepiece_does(text: str) -> None:
    """BPE over the derived merges equals the greedy definition over scores."""
    vocabulary = Vocabulary(PIECES, [TokenType.NORMAL] * len(PIECES))
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges_of_scores(vocabulary, SCORES)))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    assert tokenizer.encode(text).ids == sentencepiece_reference(text)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    path = tmp_path_factory.mktemp("gguf") / "spm.gguf"
    writer = tiny_gguf.gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * 259 + SCORES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return build_tokenizer(GgufFile(path))


@given(text=TEXT.filter(lambda text: SPACE not in text))
def test_sentencepiece_text_comes_back_through_byte_fallback(
    sentencepiece: Tokenizer, text: str
) -> None:
    """Characters outside the vocabulary travel as bytes; the added first space goes again."""
    ids = sentencepiece.encode(text, add_special_tokens=False).ids
    assert sentencepiece.decode(ids) == text


def test_sentencepiece_begins_with_bos(sentencepiece: Tokenizer) -> None:
    """The file's default for this kind."""
    assert sentencepiece.encode("ab").ids == [1, 259 + PIECES.index(SPACE + "ab")]
