"""Text to token ids and back, for one model.

What a caller writes in a conversation is text and only text: a control token is one only
where the model's own chat template put it. A caller who spells `<|im_end|>` gets those ten
characters.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from coordinator.chat_template import ChatTemplate, TemplateRefused
from coordinator.control_tokens import ControlToken, ControlTokens
from coordinator.request import ChatMessage
from kvrelay.errors import InvalidRequest, ModelInvalid
from kvrelay.store.manifest import CONFIG, TOKENIZER, read_json

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_JSON = "chat_template.json"

_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode noncharacters: never text, so one of them can mark what a caller wrote."""


class Tokenizer:
    """A model's vocabulary, chat template and the ids that end its answers.

    Nothing changes after construction, so any thread may encode; the library lets other
    threads run meanwhile.
    """

    def __init__(
        self, model_dir: Path, *, now: Callable[[], datetime.datetime] = datetime.datetime.now
    ) -> None:
        """Load from `model_dir`. `now` is the wall clock for templates that write the date.

        Raises:
            ModelInvalid: a file is missing or is not what it should be.
        """
        config = read_json(model_dir / CONFIG)
        own_config = _optional_json(model_dir / TOKENIZER_CONFIG)
        special_tokens = _special_tokens(own_config)
        self._tokenizer = _load(model_dir / TOKENIZER)
        # Encodes control tokens as text. A second instance, because the switch is the
        # instance's, and requests of both kinds may encode at once.
        self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._controls = ControlTokens(_control_tokens(self._tokenizer))
        self._template = _template(model_dir, own_config, special_tokens, now)

        self.vocab_size = _size(model_dir, config, "vocab_size")
        self.context_length = _size(model_dir, config, "max_position_embeddings")
        self.special_token_ids = frozenset(
            token.token_id for token in _control_tokens(self._tokenizer)
        )
        self.bos_token_id = _first_id(
            config.get("bos_token_id"),
            self._spelled_id(special_tokens.get("bos_token")),
        )
        self.generation_config = _optional_json(model_dir / GENERATION_CONFIG)
        self.eos_token_ids = _ids(
            self.generation_config.get("eos_token_id"),
            config.get("eos_token_id"),
            self._spelled_id(special_tokens.get("eos_token")),
        )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`; control tokens spelled in it become control tokens.

        For prompts whose caller composes the whole model input.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, for people; the model gets `encode_chat`.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
        """
        template = self._require_template()
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of the conversation as the model's template writes it.

        Roles are taken as they are: the caller has checked them against a fixed set.

        Raises:
            InvalidRequest: as `render_chat`.
        """
        if not any(self._controls.could_form(message.content) for message in messages):
            text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
            return self.encode(text, add_special_tokens=False)
        mark = _unused_mark(messages, self._require_template())
        marked = [ChatMessage(m.role, self._controls.break_up(m.content, mark)) for m in messages]
        rendered = self.render_chat(marked, add_generation_prompt=add_generation_prompt)
        token_ids: list[int] = []
        for text, control_id in self._controls.split(rendered):
            plain = self._plain.encode(text.replace(mark, ""), add_special_tokens=False)
            token_ids += plain.ids
            if control_id is not None:
                token_ids.append(control_id)
        return token_ids

    def _spelled_id(self, token: str | None) -> int | None:
        return self._tokenizer.token_to_id(token) if token else None

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequest("messages", "the model has no chat template; send text instead")
        return self._template


def _load(path: Path) -> tokenizers.Tokenizer:
    read_json(path)  # names what is wrong with the file; the library only says that it failed
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ModelInvalid(path, f"not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _control_tokens(tokenizer: tokenizers.Tokenizer) -> list[ControlToken]:
    return [
        ControlToken(token_id, token.content, eats_left=token.lstrip, eats_right=token.rstrip)
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if token.special
    ]


def _special_tokens(own_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like by name; each is a string, or an object that holds one."""
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        match own_config.get(name):
            case str(text) | {"content": str(text)}:
                found[name] = text
    return found


def _template(
    model_dir: Path,
    own_config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    now: Callable[[], datetime.datetime],
) -> ChatTemplate | None:
    path, source = _template_source(model_dir, own_config)
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens=special_tokens, now=now)
    except TemplateRefused as error:
        raise ModelInvalid(path, f"chat template: {error}") from error


def _template_source(model_dir: Path, own_config: Mapping[str, Any]) -> tuple[Path, str | None]:
    path = model_dir / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelInvalid(path, "not UTF-8") from error
    path = model_dir / CHAT_TEMPLATE_JSON
    if path.is_file():
        source = read_json(path).get("chat_template")
        return path, source if isinstance(source, str) else None
    path = model_dir / TOKENIZER_CONFIG
    match own_config.get("chat_template"):
        case str(source):
            return path, source
        case list(named):
            for entry in named:
                match entry:
                    case {"name": "default", "template": str(source)}:
                        return path, source
    return path, None


def _unused_mark(messages: Sequence[ChatMessage], template: ChatTemplate) -> str:
    for mark in _MARKS:
        if mark not in template.source and not any(mark in m.content for m in messages):
            return mark
    raise InvalidRequest("messages", f"must leave one of U+FDD0 to U+FDEF out, has {len(_MARKS)}")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _size(model_dir: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelInvalid(model_dir / CONFIG, f"{name} is {value!r}, wanted at least 1")
    return value


def _ids(*sources: object) -> tuple[int, ...]:
    """Every id the sources give, singly or in lists, each once."""
    flat: list[object] = []
    for source in sources:
        flat += source if isinstance(source, list) else [source]
    return tuple(dict.fromkeys(value for value in flat if isinstance(value, int)))


def _first_id(*sources: object) -> int | None:
    return next(iter(_ids(*sources)), None)
