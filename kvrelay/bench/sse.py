"""Server-sent events out of bytes, however they were cut on the way.

Pure. Only `data` is kept: no server of tokens uses the other fields.
"""

MAX_EVENT_NUM_BYTES = 1 << 20


class SseError(ValueError):
    """What came is no event stream that could be read here."""


class SseParser:
    """Takes bytes, gives the `data` of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes.

        Raises:
            SseError: an event grew too long.
        """
        events = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._take(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_NUM_BYTES:
            raise SseError(f"an event of more than {MAX_EVENT_NUM_BYTES} bytes")
        return events

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
