"""A server on the loopback interface that takes connections and says nothing, like a host that hangs."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class SilentServer:
    """Its port, and the connections that it has taken."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self.taken: list[socket.socket] = []
        self._listener = listener

    def take(self) -> None:
        """Until the listener is closed."""
        with suppress(OSError):
            while True:
                self.taken.append(self._listener.accept()[0])


@contextmanager
def silent_server() -> Iterator[SilentServer]:
    """One, until the end of the block."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server = SilentServer(listener)
        thread = threading.Thread(target=server.take, daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)  # which wakes `accept`
    thread.join()
    for connection in server.taken:
        connection.close()
