"""Serves the page until a signal comes."""

import asyncio
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from features.errors import ConfigError, SailError
from pipeline.explore.app import Access, create_app, is_loopback
from pipeline.explore.session import Session
from pipeline.interrupt import StopRequest

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_FINISH = 5
SECONDS_TO_WARM = 60
SECONDS_FOR_HEADERS = 10
MOST_AT_ONCE = 64  # connections; each may send an image, so that this bounds the memory
TOKEN_CHARACTERS = 16


class _Impatient(H11Protocol):
    """A connection that must send the headers of a request soon, and keeps no other one out.

    Anyone can open connections, before any token is asked for.
    """

    _deadline: asyncio.TimerHandle | None = None
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()
        others = [each for each in self.connections if isinstance(each, _Impatient)]
        waiting = {
            each._deadline.when(): each
            for each in others
            if each is not self and each._deadline is not None
        }
        if len(self.connections) >= MOST_AT_ONCE - 1 and waiting:
            oldest = waiting[min(waiting)]
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self._deadline = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def access_for(host: str, token: str | None) -> Access:
    """Return who may ask at an address: beyond this machine only who knows a token.

    Args:
        host: Address to listen at.
        token: As given; made where it is needed and not given.

    Raises:
        ConfigError: The token is too short to keep anyone out.
    """
    if token is not None and (len(token) < TOKEN_CHARACTERS or not token.isascii()):
        raise ConfigError(
            f"The token has {len(token)} characters. At least {TOKEN_CHARACTERS} of ASCII were "
            f"expected. Leave it out to have one made."
        )
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    return Access(host, token)


def serve(
    session: Session,
    access: Access,
    port: int,
    stop: StopRequest,
    on_ready: Callable[[str], None],
) -> None:
    """Serve a run until a signal comes.

    Args:
        session: The run.
        access: Who may ask, and where.
        port: To listen at; 0 takes any that is free.
        stop: Asked all the time.
        on_ready: Called with the address once it answers.

    Raises:
        ConfigError: The address or the port cannot be used.
        Stopped: A signal came.
    """
    with closing(_listening(access.host, port)) as listener:
        port = int(listener.getsockname()[1])
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(session, access),
                http=_Impatient,
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_AT_ONCE,
                timeout_graceful_shutdown=SECONDS_TO_FINISH,
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()  # signals come to the main thread only: uvicorn leaves them alone here
        warm = threading.Thread(target=_warm, args=(session,), name="warm", daemon=True)
        warm.start()
        try:
            _wait(lambda: server.started or not thread.is_alive())
            on_ready(address(access, port))
            _wait(lambda: stop() or not thread.is_alive())
        finally:
            server.should_exit = True
            thread.join()
            warm.join(SECONDS_TO_WARM)  # the end of Python amid torch's work aborts the process
    stop.check()


def address(access: Access, port: int) -> str:
    """Return what to open in a browser."""
    host = f"[{access.host}]" if ":" in access.host else access.host
    query = "" if access.token is None else f"?token={access.token}"
    return f"http://{host}:{port}/{query}"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened at: {error.strerror or error}. An address of "
            f"this machine and a free port were expected. Choose others with --host and --port."
        ) from error


def _warm(session: Session) -> None:
    """Load the text encoder and embed the first split, so that the first search is quick too."""
    try:
        if session.splits and session.checkpoint() is not None:
            session.images(session.splits[0])
            with session.encoding:
                session.aligned().encode_text(["a picture"])
    except SailError as error:
        logger.warning("%s", error)  # the page says it too, where it matters


def _wait(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(SECONDS_BETWEEN_LOOKS)
