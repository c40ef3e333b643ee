"""What a caller may ask for, and the one table of bounds that every way in is held to.

Pure. The gRPC and HTTP fronts turn their messages into a `GenerateSpec`; `check` refuses
what can never succeed, by field, before anything is tokenized, allocated or queued.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvrelay.errors import InvalidRequest

MAX_TEXT_CHARS = 1 << 20
MAX_MESSAGES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, encoded as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered by the model's chat template."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSpec:
    """A request as the caller put it. None means: not given, the default applies."""

    prompt: Prompt
    model: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What applies where a caller gives nothing: the model's makers know best."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is served and with which limits."""

    name: str
    model_digest: str
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int
    disaggregate: str
    sampling: SamplingDefaults = SamplingDefaults()


def sampling_defaults(generation_config: Mapping[str, object]) -> SamplingDefaults:
    """What a model's `generation_config.json` recommends, so far as it is within bounds."""

    def number(name: str, is_possible: Callable[[float], bool], otherwise: float) -> float:
        value = generation_config.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and is_possible(value) else otherwise  # type: ignore[arg-type]

    return SamplingDefaults(
        temperature=number("temperature", lambda t: 0 <= t <= 2, 1.0),
        top_k=int(number("top_k", lambda k: 0 <= k < 1 << 31, 0)),
        top_p=number("top_p", lambda p: 0 < p <= 1, 1.0),
        min_p=number("min_p", lambda p: 0 <= p < 1, 0.0),
    )


def check(spec: GenerateSpec, model: ModelInfo) -> None:
    """Refuse a field outside its bounds, by name.

    Raises:
        InvalidRequest: with the field, the bounds and, for numbers, the value.
    """
    if spec.model and spec.model != model.name:
        raise InvalidRequest("model", f"not served here; the model is {model.name!r}")
    check_prompt(spec.prompt, model)
    _number("temperature", spec.temperature, 0.0, 2.0)
    _number("top_p", spec.top_p, 0.0, 1.0, low_is_open=True)
    _number("min_p", spec.min_p, 0.0, 1.0, high_is_open=True)
    _number("top_k", spec.top_k, 0, model.vocab_size)
    _number("seed", spec.seed, 0, 2**64 - 1)
    _number("max_tokens", spec.max_tokens, 1, model.context_tokens)
    _count("stop", spec.stop, MAX_STOP_STRINGS)
    for text in spec.stop:
        _text("stop", text, MAX_STOP_CHARS)
        if not text:
            raise InvalidRequest("stop", f"each must have 1 to {MAX_STOP_CHARS} characters")
    _count("stop_token_ids", spec.stop_token_ids, MAX_STOP_TOKEN_IDS)
    check_token_ids("stop_token_ids", spec.stop_token_ids, model)


def check_prompt(prompt: Prompt, model: ModelInfo) -> None:
    """Refuse a prompt that can never be served.

    Raises:
        InvalidRequest: naming `text`, `messages` or `token_ids`.
    """
    match prompt:
        case TextPrompt(text=text):
            if not text:
                raise InvalidRequest("text", "must not be empty")
            _text("text", text, MAX_TEXT_CHARS)
        case ChatPrompt(messages=messages):
            if not messages:
                raise InvalidRequest("messages", "must not be empty")
            _count("messages", messages, MAX_MESSAGES)
            for i, message in enumerate(messages):
                if message.role not in ROLES:
                    raise InvalidRequest(
                        f"messages[{i}].role", f"must be one of {', '.join(ROLES)}"
                    )
                _text(f"messages[{i}].content", message.content, MAX_TEXT_CHARS)
            num_chars = sum(len(m.content) for m in messages)
            if num_chars == 0:
                raise InvalidRequest("messages", "must not all be empty")
            _number("messages", num_chars, 0, MAX_TEXT_CHARS)
        case TokenPrompt(token_ids=token_ids):
            if not token_ids:
                raise InvalidRequest("token_ids", "must not be empty")
            _count("token_ids", token_ids, model.context_tokens)
            check_token_ids("token_ids", token_ids, model)


def check_token_ids(field: str, token_ids: Sequence[int], model: ModelInfo) -> None:
    """Refuse ids outside the vocabulary. The message gives the place, not the ids."""
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(f"{field}[{i}]", f"must be in [0, {model.vocab_size})")


def resolve_max_tokens(spec: GenerateSpec, num_prompt: int, model: ModelInfo) -> int:
    """Most tokens to generate: what was asked for, or what the context leaves.

    Raises:
        InvalidRequest: prompt and output together exceed the context.
    """
    room = model.context_tokens - num_prompt
    if room < 1:
        raise InvalidRequest(
            "prompt", f"{num_prompt} tokens, the context of {model.context_tokens} leaves no room"
        )
    if spec.max_tokens is None:
        return min(room, model.default_max_tokens)
    if spec.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            f"{spec.max_tokens} after a prompt of {num_prompt} tokens exceeds the context of "
            f"{model.context_tokens}; at most {room}",
        )
    return spec.max_tokens


def _number(
    field: str,
    value: float | None,
    low: float,
    high: float,
    *,
    low_is_open: bool = False,
    high_is_open: bool = False,
) -> None:
    if value is None:
        return
    above = value > low if low_is_open else value >= low
    below = value < high if high_is_open else value <= high
    if not (math.isfinite(value) and above and below):
        bounds = f"{'(' if low_is_open else '['}{low}, {high}{')' if high_is_open else ']'}"
        raise InvalidRequest(field, f"must be in {bounds}, is {value}")


def _count(field: str, values: Sequence[object], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(field, f"at most {limit} values, has {len(values)}")


def _text(field: str, text: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InvalidRequest(field, f"at most {max_chars} characters, has {len(text)}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidRequest(field, "must be valid Unicode, has a lone surrogate")
