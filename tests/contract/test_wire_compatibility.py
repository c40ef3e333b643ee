"""Messages of yesterday can be read today: nothing on the wire is renumbered, retyped or gone.

`tests/data/wire.txt` is the wire as it once was. It may grow; a line that has to change means a
new version of the package beside the old one. What protocol version 2 changed of version 1 was
rewritten in place, since version 1 was never released.
"""

from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor

from kvrelay.v1 import (
    common_pb2,
    decode_pb2,
    generate_pb2,
    handoff_pb2,
    pool_pb2,
    prefill_pb2,
)

FILES = (common_pb2, decode_pb2, generate_pb2, handoff_pb2, pool_pb2, prefill_pb2)
GOLDEN = Path(__file__).parents[1] / "data" / "wire.txt"
TYPES = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def wire() -> set[str]:
    """One line for every field, enum value and method of the package."""
    return {line for module in FILES for line in _lines(module.DESCRIPTOR)}


def _lines(file):
    for message in file.message_types_by_name.values():
        yield from _fields(message)
    for enum in file.enum_types_by_name.values():
        yield from (f"{enum.full_name}.{v.name} = {v.number}" for v in enum.values)
    for service in file.services_by_name.values():
        for method in service.methods:
            yield (
                f"{method.full_name} {_way(method.client_streaming)}{method.input_type.name}"
                f" -> {_way(method.server_streaming)}{method.output_type.name}"
            )


def _way(is_streaming: bool) -> str:
    return "stream " if is_streaming else ""


def _fields(message):
    for field in message.fields:
        many = "repeated " if field.is_repeated else ""
        kind = field.message_type or field.enum_type
        kind = kind.full_name if kind else TYPES[field.type]
        yield f"{message.full_name}.{field.name} = {field.number} {many}{kind}"
    for nested in message.nested_types:
        yield from _fields(nested)


def test_everything_that_was_once_on_the_wire_still_is():
    """
    Same number, same type, same name, for each field, value and method.
    """
    gone = set(GOLDEN.read_text().splitlines()) - wire()

    assert not gone, f"no longer on the wire: {sorted(gone)}"


def test_everything_on_the_wire_is_recorded():
    """
    What is new is written down when it is added, so that it is kept from then on.
    """
    new = wire() - set(GOLDEN.read_text().splitlines())

    assert not new, f"add to {GOLDEN.name}: {sorted(new)}"
