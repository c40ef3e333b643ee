"""Settings of a service: one class of typed fields, filled from three places, refused by name.

A TOML file is overruled by `KVRELAY_<SERVICE>_<FIELD>` in the environment, which is overruled
by flags. All three are derived from the fields, so nothing can be set in one place and not in
another. Whatever is not a setting, and whatever value is impossible, stops the start with a
sentence that names it and where it came from.
"""

import json
import os
import socket
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kvrelay.errors import ModelInvalid

SERVICES = ("coordinator", "prefill", "decode")


class SettingsError(Exception):
    """The process cannot start as it was configured; the message says which setting and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of mutual TLS: who we are, and who may vouch for the others."""

    cert: Path
    key: Path
    ca: Path


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is not such an address.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError("must be HOST:PORT with a port of 0 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ValueError("must have an IPv6 host in brackets, as in [::1]:50051")
    return (host[1:-1] if bracketed else host), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than `localhost` are not asked."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(value: str) -> str:
    split_address(value)
    return value


def _address_or_empty(value: str) -> str:
    return _address(value) if value else value


HostPort = Annotated[str, AfterValidator(_address)]
OptionalHostPort = Annotated[str, AfterValidator(_address_or_empty)]
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
"""An empty text, which is how an environment says "not given", is None."""


class ServiceSettings(BaseModel):
    """What every service can be told. A service adds its own fields in a subclass."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    listen: HostPort = "127.0.0.1:0"
    """HOST:PORT of the gRPC server; port 0 picks a free one."""

    advertise: OptionalHostPort = ""
    """HOST:PORT at which other processes reach the gRPC server; port 0 stands for the real one.
    Empty: as `listen`."""

    insecure: bool = False
    """Bind addresses that other machines can reach, without TLS."""

    tls_cert_file: OptionalPath = None
    """PEM certificate of this service. All three TLS files or none."""

    tls_key_file: OptionalPath = None
    """PEM key of that certificate."""

    tls_ca_file: OptionalPath = None
    """PEM certificates that vouch for peers; a peer without a certificate is refused."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto` is `console` on a terminal and `json` elsewhere."""

    metrics_listen: OptionalHostPort = ""
    """HOST:PORT of a Prometheus endpoint. Empty: none."""

    ready_fd: int = -1
    """File descriptor that gets one JSON line with the addresses once they listen; -1: none."""

    @model_validator(mode="after")
    def _consistent(self) -> "ServiceSettings":
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        if any(files) and not all(files):
            raise ValueError("tls_cert_file, tls_key_file, tls_ca_file: set all three or none")
        if self.metrics_listen and not self.insecure:  # it is served without TLS
            host, _ = split_address(self.metrics_listen)
            if not is_loopback(host):
                raise ValueError(
                    f"metrics_listen: {self.metrics_listen} is not a loopback address; "
                    "set insecure to bind it all the same"
                )
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files, if any."""
        if not (self.tls_cert_file and self.tls_key_file and self.tls_ca_file):
            return None
        return TlsFiles(cert=self.tls_cert_file, key=self.tls_key_file, ca=self.tls_ca_file)

    def advertised(self, bound: str) -> str:
        """The address for others, given the one that the server bound."""
        _, bound_port = split_address(bound)
        if not self.advertise:
            host = split_address(bound)[0]
            return f"{socket.gethostname()}:{bound_port}" if host in ("0.0.0.0", "::") else bound
        host_text, _, port = self.advertise.rpartition(":")
        return f"{host_text}:{int(port) or bound_port}"


S = TypeVar("S", bound=ServiceSettings)


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as it was given, and where."""

    value: object
    source: str


def load_settings(cls: type[S], *, service: str, argv: Sequence[str]) -> S:
    """Settings of this process from file, environment and flags; exits 2 where they are refused.

    `--help` and `--print-config` answer on stdout and exit 0.
    """
    with exit_when_refused(service):
        given = _gather(cls, service=service, argv=argv, environ=os.environ)
        settings = _validate(cls, given)
    if "--print-config" in argv:
        sys.stdout.write(config_text(settings, service=service, given=given))
        raise SystemExit(0)
    return settings


def read_settings(
    cls: type[S], *, service: str, argv: Sequence[str], environ: Mapping[str, str]
) -> S:
    """As `load_settings`, without a process to exit.

    Raises:
        SettingsError: naming the setting, its value, where it came from and the bounds.
    """
    return _validate(cls, _gather(cls, service=service, argv=argv, environ=environ))


@contextmanager
def exit_when_refused(service: str) -> Iterator[None]:
    """Turn a refused start into one line on stderr and exit status 2."""
    try:
        yield
    except (SettingsError, ModelInvalid) as error:
        sys.stderr.write(f"kvrelay {service}: {error}\n")
        raise SystemExit(2) from None


def _gather(
    cls: type[ServiceSettings], *, service: str, argv: Sequence[str], environ: Mapping[str, str]
) -> dict[str, _Given]:
    assert service in SERVICES, service
    flags = _from_flags(cls, service, argv)
    env = _from_env(cls, service, environ)
    file = flags.pop("config", None) or env.pop("config", None)
    env.pop("config", None)
    return (_from_file(cls, service, file) if file else {}) | env | flags


def _from_flags(cls: type[ServiceSettings], service: str, argv: Sequence[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    rest = iter(argv)
    for word in rest:
        if word in ("--help", "-h"):
            sys.stdout.write(help_text(cls, service=service))
            raise SystemExit(0)
        if word == "--print-config":
            continue
        flag, has_value, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") and "_" not in flag else ""
        if _is_switch(cls, name) and not has_value:
            given[name] = _Given(True, flag)
        elif _is_switch(cls, name.removeprefix("no_")) and name.startswith("no_"):
            given[name.removeprefix("no_")] = _Given(False, flag)
        elif name == "config" or name in cls.model_fields:
            text = value if has_value else next(rest, None)
            if text is None:
                raise SettingsError(f"{flag} needs a value")
            given[name] = _Given(text, flag)
        else:
            have = [_flag(n) for n in cls.model_fields]
            raise SettingsError(_unknown(flag, ["--config", "--print-config", "--help", *have]))
    return given


def _from_env(
    cls: type[ServiceSettings], service: str, environ: Mapping[str, str]
) -> dict[str, _Given]:
    prefix = _env(service, "")
    names = {_env(service, name): name for name in ("config", *cls.model_fields)}
    given = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        if variable not in names:
            raise SettingsError(_unknown(variable, names))
        given[names[variable]] = _Given(text, f"environment {variable}")
    return given


def _from_file(cls: type[ServiceSettings], service: str, file: _Given) -> dict[str, _Given]:
    """Settings at the top level of the file, overruled by those of the service's own table."""
    try:
        tree = tomllib.loads(Path(str(file.value)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file.source} {file.value}: {error}") from error
    own = tree.get(service, {})
    if not isinstance(own, dict):
        raise SettingsError(f"{file.value}: {service} must be a table")
    shared = {name: value for name, value in tree.items() if name not in SERVICES}
    for name in (*shared, *own):
        if name not in cls.model_fields:
            raise SettingsError(f"{file.value}: {_unknown(name, cls.model_fields)}")
    return {n: _Given(v, f"file {file.value}") for n, v in (shared | own).items()}


def _validate(cls: type[S], given: Mapping[str, _Given]) -> S:
    try:
        return cls.model_validate({name: g.value for name, g in given.items()})
    except ValidationError as error:
        problems = [_problem(cls, given, e["loc"], e["msg"]) for e in error.errors()]
        raise SettingsError("; ".join(problems)) from error


def _problem(
    cls: type[ServiceSettings],
    given: Mapping[str, _Given],
    loc: tuple[int | str, ...],
    message: str,
) -> str:
    message = message.removeprefix("Value error, ")
    name = str(loc[0]) if loc else ""
    if name not in cls.model_fields:
        return message
    if name not in given:
        return f"{name} must be set ({_flag(name)})"
    limits = _limits(cls.model_fields[name])
    message = message.replace("Input should be", "must be", 1)
    return f"{name} = {given[name].value!r} from {given[name].source}: {message}" + (
        f"; bounds: {limits}" if limits else ""
    )


def _unknown(name: str, have: Sequence[str] | Mapping[str, Any]) -> str:
    return f"{name} is not a setting; have {', '.join(sorted(have))}"


def _is_switch(cls: type[ServiceSettings], name: str) -> bool:
    return name in cls.model_fields and cls.model_fields[name].annotation is bool


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _env(service: str, name: str) -> str:
    return f"KVRELAY_{service}_{name}".upper()


def _limits(field: FieldInfo) -> str:
    """The bounds of a number, in words."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return ", ".join(
        f"{words[name]} {limit}"
        for constraint in field.metadata
        for name in words
        if (limit := getattr(constraint, name, None)) is not None
    )


def _choices(field: FieldInfo) -> str:
    is_literal = get_origin(field.annotation) is Literal
    return " | ".join(map(str, get_args(field.annotation))) if is_literal else ""


def help_text(cls: type[ServiceSettings], *, service: str) -> str:
    """Every setting with its flag, bounds, default and meaning."""
    lines = [
        f"kvrelay {service}",
        "",
        f"A setting is a flag, {_env(service, 'NAME')} in the environment, or a key of the",
        f"file (top level or table [{service}]); flags overrule the environment, which",
        "overrules the file.",
        "",
        "  --config FILE\n      TOML file to read.",
        "  --print-config\n      Show the settings in force and where each came from.",
        "  --help\n      Show this.",
    ]
    for name, field in cls.model_fields.items():
        flag = f"{_flag(name)} | --no-{name.replace('_', '-')}"
        flag = flag if _is_switch(cls, name) else f"{_flag(name)} {name.rpartition('_')[2].upper()}"
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        bounds = f"; {bounds}" if (bounds := _limits(field) or _choices(field)) else ""
        meaning = " ".join((field.description or "").split())
        lines.append(f"  {flag}\n      {meaning} ({default}{bounds})")
    return "\n".join(lines) + "\n"


def config_text(
    settings: ServiceSettings, *, service: str, given: Mapping[str, _Given] | None = None
) -> str:
    """The settings as the TOML file that would give them."""
    lines = [f"[{service}]"]
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        source = given[name].source if given and name in given else "default"
        lines.append(f"{'# ' if value is None else ''}{name} = {_toml(value)}  # {source}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if value is None:
        return '""'
    return json.dumps(value if isinstance(value, bool | int | float | str | list) else str(value))
