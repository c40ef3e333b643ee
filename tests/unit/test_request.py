"""What a model recommends, and what a conversation must have."""

import pytest

from coordinator.request import (
    ChatMessage,
    ChatPrompt,
    SamplingDefaults,
    check_prompt,
    sampling_defaults,
)
from kvrelay.errors import InvalidRequest
from tests.support.scripted_coordinator import MODEL


def test_a_models_own_recommendation_is_the_default():
    """
    What `generation_config.json` names is taken; the rest stays as it is.
    """
    found = sampling_defaults({"temperature": 0.2, "top_p": 0.9, "eos_token_id": 2})

    assert found == SamplingDefaults(temperature=0.2, top_p=0.9)


@pytest.mark.parametrize("value", [-1, 3, "hot", None, True, float("nan")])
def test_an_impossible_recommendation_is_passed_over(value):
    """
    A model directory cannot make requests fail that say nothing wrong.
    """
    assert sampling_defaults({"temperature": value}) == SamplingDefaults()


def test_a_conversation_without_a_word_is_refused():
    """
    Templates would make a prompt of it, and the model would talk to itself.
    """
    with pytest.raises(InvalidRequest) as refused:
        check_prompt(ChatPrompt((ChatMessage("user", ""),)), MODEL)

    assert refused.value.field == "messages"
