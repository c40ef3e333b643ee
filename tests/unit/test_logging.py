"""Logs are events with fields on stderr, and never hold what callers say."""

import json
import logging
import threading

import pytest
import structlog

from kvrelay.errors import NotFound
from kvrelay.obs.logging import PRIVATE_FIELDS, configure


@pytest.fixture(autouse=True)
def restored():
    """Logging is the process's; give it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def log_lines(capsys):
    def read():
        captured = capsys.readouterr()
        assert captured.out == ""
        return [json.loads(line) for line in captured.err.splitlines()]

    return read


def test_an_event_is_one_json_object_on_stderr_where_nobody_watches(log_lines):
    """With its severity, its time, its fields and those of the process."""
    configure(level="info", fmt="auto", service="prefill", worker_id="prefill-0")
    structlog.get_logger().info("handoff.pulled", num_blocks=12)

    (line,) = log_lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "handoff.pulled",
        "level": "info",
        "num_blocks": 12,
        "service": "prefill",
        "worker_id": "prefill-0",
    }


def test_events_of_every_thread_carry_the_fields_of_the_process(log_lines):
    """The engine has a thread of its own."""
    configure(level="info", fmt="json", service="decode")
    thread = threading.Thread(target=lambda: structlog.get_logger().info("engine.started"))
    thread.start()
    thread.join()

    assert [line["service"] for line in log_lines()] == ["decode"]


def test_bound_fields_of_a_request_are_merged(log_lines):
    """Whoever handles a request binds its id once."""
    configure(level="info", fmt="json")
    with structlog.contextvars.bound_contextvars(request_id="r"):
        structlog.get_logger().info("request.ended")

    assert log_lines()[0]["request_id"] == "r"


def test_events_below_the_level_are_dropped_ours_and_those_of_libraries(log_lines):
    """One setting for all."""
    configure(level="warning", fmt="json")
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    structlog.get_logger().warning("loud")
    logging.getLogger("library").warning("%s", "loud too")

    assert [line["event"] for line in log_lines()] == ["loud", "loud too"]


def test_a_console_is_for_people(capsys):
    """No JSON there."""
    configure(level="info", fmt="console")
    structlog.get_logger().info("handoff.pulled", num_blocks=12)

    text = capsys.readouterr().err
    assert "handoff.pulled" in text
    assert "num_blocks=12" in text
    assert not text.startswith("{")


@pytest.mark.parametrize("name", sorted(PRIVATE_FIELDS))
def test_fields_that_would_hold_what_callers_say_are_blanked(log_lines, name):
    """A slip of the pen must not become a leak."""
    configure(level="info", fmt="json")
    structlog.get_logger().info("slip", **{name: "secret"})

    assert log_lines()[0][name] == "[private]"


def fail(error):
    try:
        raise error
    except Exception:
        structlog.get_logger().exception("rpc.bug")
        logging.getLogger("library").exception("failed")


@pytest.mark.parametrize("error", [ValueError("secret"), KeyError("secret")])
def test_a_stack_is_logged_without_messages_that_may_hold_data(log_lines, error):
    """Frames and types tell where a bug is; the value that met it may be a prompt."""
    configure(level="info", fmt="json")
    fail(error)

    for line in log_lines():
        assert f"builtins.{type(error).__name__}" in line["exception"]
        assert "in fail" in line["exception"]
        assert "secret" not in json.dumps(line)


@pytest.mark.parametrize(
    "error",
    [NotFound("no hold abc"), OSError(2, "No such file", "m.toml"), AssertionError("3 != 4")],
)
def test_messages_that_are_made_by_code_are_shown(log_lines, error):
    """Our own errors carry numbers, and those of the system name files."""
    configure(level="info", fmt="json")
    fail(error)

    assert all(str(error) in line["exception"] for line in log_lines())


def test_causes_come_first(log_lines):
    """As Python prints them."""
    configure(level="info", fmt="json")
    value = "".join(("sec", "ret"))
    try:
        try:
            raise ValueError(value)
        except ValueError as cause:
            raise NotFound("no hold") from cause
    except NotFound:
        structlog.get_logger().exception("lost")

    text = log_lines()[0]["exception"]
    assert text.index("ValueError") < text.index("NotFound: no hold")
    assert "secret" not in text


def test_all_exceptions_of_a_group_are_shown(log_lines):
    """What a task group raises is of no use without its parts."""
    configure(level="info", fmt="json")
    fail(ExceptionGroup("in tasks", [NotFound("no hold"), ValueError("secret")]))

    for line in log_lines():
        assert "in tasks" in line["exception"]
        assert "NotFound: no hold" in line["exception"]
        assert "ValueError" in line["exception"]
        assert "secret" not in line["exception"]
