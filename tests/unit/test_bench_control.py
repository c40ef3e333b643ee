"""The script that workers and callers of a control-plane measurement both know."""

from kvrelay.bench.control.script import TEXT, Script

SCRIPT = Script(range(100, 110))


def test_an_answer_is_the_text_from_where_the_prompt_says_over_and_over() -> None:
    """Position by position what a worker samples, wherever its attempt begins."""
    prompt_ids = SCRIPT.prompt(3, 4)
    start = SCRIPT.start(prompt_ids)

    assert prompt_ids == [103, 104, 105, 106]
    assert start == sum(prompt_ids) % 10
    assert SCRIPT.answer(prompt_ids, 25) == [SCRIPT.token(start, i) for i in range(25)]
    assert SCRIPT.token(start, 13) == SCRIPT.token(start, 3)


def test_prompts_differ() -> None:
    """So no caller is served from what another one asked."""
    assert len({tuple(SCRIPT.prompt(i, 4)) for i in range(10)}) == 10


def test_the_text_has_characters_of_every_length() -> None:
    """One to four bytes: what detokenizers trip over."""
    assert {len(character.encode()) for character in TEXT} == {1, 2, 3, 4}
