"""A model's chat template, run as what it is: a stranger's program.

Templates come with the model, so they run in jinja2's immutable sandbox, are bounded before
and while they run, and see the messages and the model's own special tokens, nothing else.
Rendering follows the conventions Hugging Face templates are written for.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.request import ChatMessage
from kvrelay.errors import InvalidRequest

MAX_TEMPLATE_CHARS = 1 << 18
MAX_TEMPLATE_NODES = 20_000
"""Templates of real models have some hundreds."""

MAX_RENDERED_CHARS = 1 << 22
"""Four times the longest conversation that is accepted."""

_RUNTIME_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template that does not suit the messages can raise."""


class TemplateRefused(ValueError):
    """The template itself cannot be used; the message says why."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: the jinja text.
        special_tokens: names such as `bos_token` to their text, for the template to use.
        now: the wall clock some templates write the date from.

    Raises:
        TemplateRefused: too long, too large, or not a jinja template.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime.datetime],
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateRefused(f"{len(source)} characters, limit {MAX_TEMPLATE_CHARS}")
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            num_nodes = sum(1 for _ in environment.parse(source).find_all(nodes.Node))
            if num_nodes > MAX_TEMPLATE_NODES:
                raise TemplateRefused(f"{num_nodes} nodes, limit {MAX_TEMPLATE_NODES}")
            self._template = environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise TemplateRefused("not a jinja template") from error
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The conversation as the model was trained to read it.

        Raises:
            InvalidRequest: the template does not take such messages, or they grow too long.
        """
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequest(
                        "messages",
                        f"rendered to more than {MAX_RENDERED_CHARS} characters",
                    )
        except _RUNTIME_ERRORS as error:
            raise InvalidRequest("messages", self._reason(error)) from None
        return "".join(pieces)

    def _reason(self, error: Exception) -> str:
        """Only words that stand in the template itself: others could be the caller's text."""
        said = str(error)
        if isinstance(error, _Raised) and said in self.source:
            return f"refused by the model's chat template: {said[:200]}"
        return f"the model's chat template cannot render them ({type(error).__name__})"


class _Raised(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute, operator or method that could grow memory without bound."""

    intercepted_binops = frozenset({"*", "**", "%"})
    _PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers or operator == "**":
            raise SecurityError(f"operator {operator} is only for numbers")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in self._PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)


class _Generation(Extension):
    """`{% generation %}` marks what was trained on; serving renders its body as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
