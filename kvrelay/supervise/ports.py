"""Ports that are known before the process that will listen on them is."""

import socket


class PortTaken(Exception):
    """Something else listens where the coordinator was to."""

    def __init__(self, address: str, flag: str) -> None:
        super().__init__(f"{address} is taken; choose another port with {flag}, or 0 for any")


class ReservedPort:
    """A port of this machine that is ours until `close`, though nobody may listen yet.

    A socket holds it that never listens: that keeps no process of ours from listening there, in
    this life or the next, but nobody else is given the port by chance.
    """

    def __init__(self, address: str, *, flag: str) -> None:
        """Reserve the port of an IPv4 `address`, any free one if it is 0.

        Raises:
            PortTaken: somebody listens there; `flag` chooses another.
        """
        host, _, port = address.rpartition(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, int(port)))
        except OSError as error:
            self.close()
            raise PortTaken(address, flag) from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()
