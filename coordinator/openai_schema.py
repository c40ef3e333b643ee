"""What the HTTP front accepts: OpenAI's request bodies, held to exactly what is served here.

A field is either obeyed, ignored openly (`user`, `store`, `metadata`, `service_tier`), or
accepted with the one value that changes nothing. Everything else is refused by name, so
no caller believes in an option that does nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from coordinator.request import ChatMessage, ChatPrompt, GenerateSpec, TextPrompt, TokenPrompt
from kvrelay.errors import InvalidRequest

MAX_OBJECT_KEYS = 64
"""Most names in one JSON object: far above what any field needs, and it bounds the refusals."""

MAX_SHOWN_NAME_CHARS = 64


def _only(*values: object) -> AfterValidator:
    """Accept null and `values`, which are what happens here anyway."""

    def check(value: object) -> object:
        # 1 == True in Python, not in JSON.
        if value is None or any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in values
        ):
            return value
        shown = " or ".join(json.dumps(v) for v in values) or "null"
        raise PydanticCustomError("unsupported", "not supported; {shown} only", {"shown": shown})

    return AfterValidator(check)


def _none_is_empty(value: object) -> object:
    return [] if value is None else value


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if value is None or isinstance(value, list):
        return value or []
    raise PydanticCustomError("neither", "must be a string or a list of strings")


def _text_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("neither", "must be a string or a list of text parts")


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class TextPart(_Body):
    """A piece of a message's content. Text is the only kind served."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn. The fields that assistants' messages carry back may be there, empty."""

    role: str
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_text_parts)]
    name: Annotated[object, _only()] = None
    refusal: Annotated[object, _only()] = None
    audio: Annotated[object, _only()] = None
    function_call: Annotated[object, _only()] = None
    tool_calls: Annotated[object, _only([])] = None
    annotations: Annotated[object, _only([])] = None

    def to_chat_message(self) -> ChatMessage:
        # OpenAI renamed its system role; chat templates know only the old name.
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, "".join(part.text for part in self.content))


class StreamOptions(_Body):
    """How a stream is written."""

    include_usage: bool | None = None


class GenerateBody(_Body):
    """What both generating routes accept."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], FailFast(), BeforeValidator(_stop_list)] = []
    stop_token_ids: Annotated[list[int], FailFast(), BeforeValidator(_none_is_empty)] = []
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: str | None = None
    """Ignored, as are the next three: nothing is kept, billed or routed by them here."""

    service_tier: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    n: Annotated[object, _only(1)] = None
    presence_penalty: Annotated[object, _only(0)] = None
    frequency_penalty: Annotated[object, _only(0)] = None
    repetition_penalty: Annotated[object, _only(1)] = None
    logit_bias: Annotated[object, _only({})] = None
    logprobs: Annotated[object, _only(False)] = None
    echo: Annotated[object, _only(False)] = None
    best_of: Annotated[object, _only(1)] = None
    response_format: Annotated[object, _only({"type": "text"})] = None
    tools: Annotated[object, _only([])] = None
    tool_choice: Annotated[object, _only("none", "auto")] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "needs stream to be true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError("max_tokens", "max_completion_tokens is given too; one only")
        return self

    @property
    def max_tokens_name(self) -> str:
        """The name by which the caller bounded the output."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def _spec(self, prompt: TextPrompt | ChatPrompt | TokenPrompt) -> GenerateSpec:
        bounds = (self.max_tokens, self.max_completion_tokens)
        return GenerateSpec(
            prompt=prompt,
            model=self.model,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            max_tokens=next((bound for bound in bounds if bound is not None), None),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(GenerateBody):
    """The body of `POST /v1/completions`."""

    prompt: object

    def to_spec(self) -> GenerateSpec:
        return self._spec(_prompt(self.prompt))


class ChatBody(GenerateBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast()]

    def to_spec(self) -> GenerateSpec:
        return self._spec(ChatPrompt(tuple(m.to_chat_message() for m in self.messages)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request body, understood."""

    spec: GenerateSpec
    is_streamed: bool
    with_usage: bool
    renames: Mapping[str, str]
    """What the caller calls the fields of `spec`, where the names differ."""

    def param(self, field: str) -> str:
        """The caller's name of a field of `spec`, any index kept."""
        name, bracket, index = field.partition("[")
        return self.renames.get(name, name) + bracket + index


def parse(body_type: type[CompletionBody] | type[ChatBody], data: bytes) -> Call:
    """Understand a body.

    Raises:
        InvalidRequest: not JSON, or a field is unknown, of a wrong type or not supported.
    """
    try:
        body = body_type.model_validate(_json_object(data))
    except ValidationError as error:
        _refuse(error)
    prompt_name = "messages" if isinstance(body, ChatBody) else "prompt"
    return Call(
        spec=body.to_spec(),
        is_streamed=bool(body.stream),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
        renames={
            "text": prompt_name,
            "token_ids": prompt_name,
            "prompt": prompt_name,
            "max_tokens": body.max_tokens_name,
        },
    )


def _prompt(value: object) -> TextPrompt | TokenPrompt:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return TextPrompt(value)
    if not isinstance(value, list):
        raise InvalidRequest("prompt", "must be a string or a list of token ids")
    if any(isinstance(item, str | list) for item in value):
        raise InvalidRequest("prompt", f"one prompt per request, has {len(value)}")
    for i, token_id in enumerate(value):
        if type(token_id) is not int:
            raise InvalidRequest(f"prompt[{i}]", "must be an integer")
    return TokenPrompt(tuple(value))


def _json_object(data: bytes) -> dict[str, Any]:
    """Parse strictly: what two parsers could read differently is refused."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest("body", f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        problem = f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise InvalidRequest("body", problem) from None
    except RecursionError:
        raise InvalidRequest("body", "nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InvalidRequest("body", "a number has too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "must be a JSON object")
    return cast(dict[str, Any], value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_OBJECT_KEYS:
        problem = f"at most {MAX_OBJECT_KEYS} names in an object, one has {len(pairs)}"
        raise InvalidRequest("body", problem)
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest(_shown(name), "given twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest("body", f"{name} is not JSON")


_PROBLEMS: Mapping[str, Callable[[str], str]] = {
    "extra_forbidden": lambda _: "unknown field",
    "missing": lambda _: "required",
    "string_type": lambda _: "must be a string",
    "string_unicode": lambda _: "must be valid Unicode",
    "int_type": lambda _: "must be an integer",
    "float_type": lambda _: "must be a number",
    "bool_type": lambda _: "must be true or false",
    "list_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be an object",
    "model_type": lambda _: "must be an object",
    "model_attributes_type": lambda _: "must be an object",
    "literal_error": lambda _: 'not supported; "text" only',
}


def _refuse(error: ValidationError) -> NoReturn:
    """Raise what is wrong with the first wrong field, without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = first["type"], first["msg"]
    steps = (f"[{at}]" if isinstance(at, int) else f".{_shown(at)}" for at in first["loc"])
    name = "".join(steps).removeprefix(".")
    if not name:  # our own errors about a whole body are named after the field at fault
        name = kind if kind in GenerateBody.model_fields else "body"
    problem = _PROBLEMS.get(kind, str)(message)
    raise InvalidRequest(name, problem) from None


def _shown(name: str) -> str:
    """A caller's own field name, fit for an error and a log."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= MAX_SHOWN_NAME_CHARS else shown[:MAX_SHOWN_NAME_CHARS] + "..."
