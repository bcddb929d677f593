"""The server: waitress in front of the application, until it is told to stop.

It runs by itself, or in a thread beside what else a process does; one stop ends both.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import waitress
from typing_extensions import override
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from kappa_log.errors import UsageError
from kappa_log.web.errors import members
from kappa_log.web.factory import create_app
from kappa_log.web.replays import JOBS
from kappa_log.web.security import HEADERS, LOOPBACK_HOSTS, MAX_BODY

if TYPE_CHECKING:
    from kappa_log.app import KappaLog

THREADS = 8
MAX_HEADER = 16 * 1024
MAX_CONNECTIONS = 200
IDLE_SECONDS = 60

TICK_SECONDS = 0.2
"""How long a request to stop may go unnoticed."""

LAST_SECONDS = 4
"""How long what is being answered, and what replays write, may take once it is to end;
what takes longer dies with the process, and rolls back."""


class Server:
    """An application that listens.

    Args:
        log: The log to serve.
        host: Where to listen. Loopback needs no token; anywhere else needs one.
        port: Which port; 0 takes a free one.

    Raises:
        UsageError: Others could connect and there is no token, or the port is taken.
    """

    def __init__(self, log: KappaLog, host: str, port: int) -> None:
        is_private = is_loopback(host)
        if not is_private and not log.has_tokens():
            msg = (
                f"{host} can be reached from other machines, and there is no token: "
                "nothing was started. Make one (kappa-log token create NAME --role "
                "operate), or listen on 127.0.0.1"
            )
            raise UsageError(msg)
        hosts = [*LOOPBACK_HOSTS, *log.config.api.hosts] if is_private else None
        self.app = create_app(
            log, needs_token=not is_private, hosts=hosts or log.config.api.hosts or None
        )
        self._sockets: dict[int, Any] = {}
        self._listener = _listen(host, port)
        self._server = waitress.create_server(
            self.app,
            map=self._sockets,
            sockets=[self._listener],
            threads=THREADS,
            ident=None,
            connection_limit=MAX_CONNECTIONS,
            channel_timeout=IDLE_SECONDS,
            max_request_body_size=MAX_BODY,
            max_request_header_size=MAX_HEADER,
            # Closing what was not read to its end resets the connection, and with it
            # the answer that says why: too long headers are read at once.
            recv_bytes=4 * MAX_HEADER,
        )
        self._server.channel_class = _Channel
        # It would say of every busy moment that requests wait for a thread.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, stop: threading.Event) -> None:
        """Answer until told to stop; what is being answered is finished."""
        try:
            while not stop.is_set():
                wasyncore.loop(timeout=TICK_SECONDS, map=self._sockets, count=1)
        finally:
            end = time.monotonic() + LAST_SECONDS
            jobs = self.app.extensions[JOBS]
            jobs.tell_to_stop()
            self._server.task_dispatcher.shutdown(timeout=LAST_SECONDS)
            jobs.stop(end - time.monotonic())
            wasyncore.close_all(self._sockets)

    @contextlib.contextmanager
    def beside(self, stop: threading.Event) -> Iterator[None]:
        """Answer in a thread while a block runs; one stop is for both.

        The end of the block stops the server, and the end of the server the block.
        """
        failed: list[BaseException] = []

        def answer() -> None:
            try:
                self.run(stop)
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                failed.append(error)
                stop.set()

        thread = threading.Thread(target=answer, name="serve", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(LAST_SECONDS + 1)
        if failed:
            raise failed[0]


class _Refusal(ErrorTask):  # type: ignore[misc]  # waitress has no types
    """The answer to what is refused before the application sees it."""

    @override
    def execute(self) -> None:
        code = self.request.error.code
        # Nobody has looked at its path yet.
        body = msgspec.json.encode(members(code, _REFUSED[code], instance=""))
        self.status = f"{code} {self.request.error.reason}"
        headers = HEADERS | {"Content-Type": "application/json"}
        self.response_headers.extend(headers.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


_REFUSED = {
    400: "this is no HTTP request",
    413: f"the body is longer than {MAX_BODY} bytes",
    431: f"the request's line and headers are longer than {MAX_HEADER} bytes",
    500: "internal error; the server's log says more",
    501: "this transfer encoding is not read",
}
"""By all codes that waitress has."""


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection."""

    error_task_class = _Refusal


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UsageError: There is no such address, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        msg = f"cannot listen on {host} port {port}: {reason}; see --host and --port"
        raise UsageError(msg) from None
