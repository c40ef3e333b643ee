"""Text leaves in whole characters, stops where it should, and does not depend on grouping."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from coordinator.detokenizer import MAX_UNSETTLED_TOKENS, Detokenizer
from coordinator.tokenizer import Tokenizer
from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf

NUM_TOKENS = len(tiny_gguf.TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny")
    source = tiny_gguf.write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
    gguf_model.convert(source, path, progress=Silent())
    return Tokenizer(path)


@st.composite
def groups(draw: st.DrawFn, token_ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """Token ids, cut into pushes at random."""
    ids = draw(token_ids)
    cuts = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


ANY_IDS = st.lists(st.integers(0, NUM_TOKENS - 1), max_size=MAX_UNSETTLED_TOKENS - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def all_of(detokenizer: Detokenizer, pushes: list[list[int]]) -> str:
    return "".join(detokenizer.push(ids) for ids in pushes) + detokenizer.finish()


@given(groups(ANY_IDS))
def test_the_pieces_add_up_to_the_whole(tokenizer: Tokenizer, pushes: list[list[int]]) -> None:
    """For any tokens, bytes that are not UTF-8 and special tokens among them."""
    whole = tokenizer.decode([i for ids in pushes for i in ids])
    assert all_of(Detokenizer(tokenizer, (), ()), pushes) == whole


@given(TEXT)
def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    """Every piece sent is a beginning of the text, however many tokens a character takes."""
    detokenizer = Detokenizer(tokenizer, (), ())
    sent = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        sent += detokenizer.push([token_id])
        assert text.startswith(sent)
    assert sent + detokenizer.finish() == text


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, read character by character."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


STOPS = st.lists(st.text("ehlo w1", min_size=1, max_size=4), min_size=1, max_size=3)
SPOKEN = st.text("ehlo w12é", max_size=40)


@given(SPOKEN, STOPS, st.data())
def test_a_stop_string_cuts_the_text_where_it_begins(
    tokenizer: Tokenizer, text: str, stops: list[str], data: st.DataObject
) -> None:
    """However the tokens are grouped; nothing of the stop string is ever sent."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pushes = data.draw(groups(st.just(ids)))
    detokenizer = Detokenizer(tokenizer, (), stops)
    assert all_of(detokenizer, pushes) == cut(text, stops)
    assert (detokenizer.stopped is not None) == any(stop in text for stop in stops)


@given(SPOKEN, STOPS)
def test_tokens_after_the_stop_are_not_counted(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    """The token that completes the stop string is the last that was used."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, (), stops)
    detokenizer.push(ids)
    num_used = next(
        (n for n in range(len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stops)),
        len(ids),
    )
    assert detokenizer.num_used == num_used


def test_what_may_begin_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    """It is sent as soon as it cannot be one any more."""
    detokenizer = Detokenizer(tokenizer, (), ["hew"])
    h, e, o = (tokenizer.encode(c, add_special_tokens=False) for c in "heo")
    assert detokenizer.push(h) == ""
    assert detokenizer.push(e) == ""
    assert detokenizer.push(o) == "heo"


def test_special_tokens_are_silent_unless_asked_for(tokenizer: Tokenizer) -> None:
    """The end of a turn is not part of the answer."""
    assert Detokenizer(tokenizer, (), ()).push([1, 2]) == ""
    loud = Detokenizer(tokenizer, (), (), skip_special_tokens=False)
    assert loud.push([1, 2]) == "<|im_start|><|im_end|>"


def test_a_prompt_that_ends_inside_a_character_is_not_repeated(tokenizer: Tokenizer) -> None:
    """The prompt's bytes stay the prompt's."""
    prompt = tokenizer.encode("hello é", add_special_tokens=False)[:-1]
    letter = tokenizer.encode("o", add_special_tokens=False)
    assert Detokenizer(tokenizer, prompt, ()).push(letter) == "o"


def test_endless_rubbish_is_sent_in_the_end(tokenizer: Tokenizer) -> None:
    """What is held back is bounded."""
    half = tokenizer.encode("é", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer, (), ())
    assert detokenizer.push([half] * MAX_UNSETTLED_TOKENS) == "\ufffd" * MAX_UNSETTLED_TOKENS


class ByteFallback:
    """A SentencePiece vocabulary: spaces in the tokens, bytes for what it lacks."""

    special_token_ids = frozenset({0})

    def __init__(self) -> None:
        byte_tokens = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
        vocab = {"<unk>": 0, **byte_tokens, "\u2581a": 257, "a": 258}
        self._library = Library(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
        self._library.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self._library.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def byte_ids(data: bytes) -> list[int]:
    return [byte + 1 for byte in data]


def test_the_space_before_a_word_depends_on_what_came_before() -> None:
    """At the very beginning it is the vocabulary's own, after a prompt it is a space."""
    assert Detokenizer(ByteFallback(), (), ()).push([257, 257]) == "a a"
    assert Detokenizer(ByteFallback(), [257], ()).push([257, 257]) == " a a"


def test_bytes_become_characters_when_complete() -> None:
    """Each push sends what is whole by then."""
    detokenizer = Detokenizer(ByteFallback(), (), ())
    assert [detokenizer.push([i]) for i in byte_ids("中é".encode())] == ["", "", "中", "", "é"]


def test_bad_bytes_after_good_ones_do_not_take_back_what_was_sent() -> None:
    """This decoder would call the whole run bad; the character already sent stays."""
    detokenizer = Detokenizer(ByteFallback(), (), ())
    sent = [detokenizer.push([i]) for i in [*byte_ids("中".encode()), 0xFF + 1, 258]]
    assert "".join(sent) + detokenizer.finish() == "中\ufffda"


@given(groups(st.lists(st.integers(0, 258), max_size=MAX_UNSETTLED_TOKENS - 1)))
def test_no_tokens_whatever_raise(pushes: list[list[int]]) -> None:
    """A model may say anything."""
    all_of(Detokenizer(ByteFallback(), (), ()), pushes)


@given(groups(st.lists(st.integers(0, 258), max_size=MAX_UNSETTLED_TOKENS - 1)), STOPS)
def test_what_is_sent_does_not_depend_on_grouping(
    pushes: list[list[int]], stops: list[str]
) -> None:
    """Tokens that come together make the text, and count as used, as if they came singly."""
    for tokenizer_stops in ((), (*stops, "a a", "\ufffd")):
        together = Detokenizer(ByteFallback(), (), tokenizer_stops)
        singly = Detokenizer(ByteFallback(), (), tokenizer_stops)
        text = all_of(together, pushes)

        assert text == all_of(singly, [[i] for ids in pushes for i in ids])
        assert (together.num_used, together.stopped) == (singly.num_used, singly.stopped)


@given(groups(ANY_IDS), STOPS)
def test_grouping_changes_nothing_for_bytes_either(
    tokenizer: Tokenizer, pushes: list[list[int]], stops: list[str]
) -> None:
    """The same for a byte-level vocabulary, control tokens among its tokens."""
    together, singly = Detokenizer(tokenizer, (), stops), Detokenizer(tokenizer, (), stops)
    text = all_of(together, pushes)

    assert text == all_of(singly, [[i] for ids in pushes for i in ids])
    assert (together.num_used, together.stopped) == (singly.num_used, singly.stopped)
