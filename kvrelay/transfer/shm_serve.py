"""Passes a descriptor of the KV memory to peers, who then read it without asking again.

The descriptor travels over an abstract Unix socket, so nothing has a path, nothing is left
behind by a process that dies, and only the kernel's word counts on who is calling. The
connection stays open for as long as the peer uses the memory: its end tells the peer that we
are gone, and tells us that the peer is.
"""

import os
import secrets
import selectors
import socket
import struct
import threading

import structlog

ADDRESS_PREFIX = "kvrelay-shm-"

_BACKLOG = 64
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

log = structlog.get_logger(__name__)


def peer_uid(connection: socket.socket) -> int:
    """User id of the other end, by the kernel's account."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid


class DescriptorServer:
    """Gives (`manifest`, descriptor) to whoever connects and is our own user.

    Runs in one thread until `close`. The descriptor handed out cannot be written through, and
    is a duplicate: the caller keeps its own.
    """

    def __init__(self, fd: int, manifest: bytes, *, max_peers: int) -> None:
        self.address = ADDRESS_PREFIX + secrets.token_hex(16)
        self._manifest = manifest
        self._max_peers = max_peers
        self._peers: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(b"\0" + self.address.encode())
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Given up for a moment to turn a peer away when the process has no descriptor left;
        # a connection that cannot be accepted would wake the thread for ever.
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="kv-shm-serve", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and let connected peers know. Call once."""
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        self._selector.close()
        self._listener.close()
        for fd in (self._fd, self._wake_fd, self._spare_fd):
            os.close(fd)

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._wake_fd:
                    return
                self._attend(key.fileobj)

    def _attend(self, ready: object) -> None:
        if ready is self._listener:
            peer = self._welcome()
            if peer is not None:
                self._selector.register(peer, selectors.EVENT_READ)
                self._peers.add(peer)
            return
        # A peer never sends: it left, or it is none of ours.
        assert isinstance(ready, socket.socket)
        self._selector.unregister(ready)
        self._peers.discard(ready)
        ready.close()

    def _welcome(self) -> socket.socket | None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            log.warning("shm.accept_failed", errno=error.errno, num_peers=len(self._peers))
            self._turn_away()
            return None
        try:
            self._introduce(peer)
        except OSError as error:
            log.warning("shm.peer_refused", problem=error.strerror, num_peers=len(self._peers))
            peer.close()
            return None
        return peer

    def _introduce(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if peer_uid(peer) != os.geteuid():
            raise PermissionError(0, "another user")
        if len(self._peers) >= self._max_peers:
            raise OSError(0, f"limit of {self._max_peers} peers")
        socket.send_fds(peer, [self._manifest], [self._fd])

    def _turn_away(self) -> None:
        os.close(self._spare_fd)
        try:
            self._listener.accept()[0].close()
        except OSError:
            pass  # nobody waits any more
        finally:
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
