"""The process: a socket that is bound before anything is loaded, the token, the names it answers to, uvicorn."""

import importlib.util
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from neucore_plugin.common.errors import ConfigError, FileError
from neucore_plugin.common.files import read_text

TOKEN = "NEUCORE_TOKEN"
_SHORTEST = 16
_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def require() -> None:
    """Raises ConfigError where a package of the extra is not installed."""
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"`neucore serve` needs {', '.join(missing)}: pip install 'neucore-plugin[serve]'")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises ConfigError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}); "
            "choose another with --port (0: any free one), or another --host"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_token(file: Path | None, needed: bool) -> str | None:
    """The token of a file or of the environment; None where there is none. Raises ConfigError, where it is `needed`."""
    place = f"--token-file {file}" if file else f"the environment variable {TOKEN}"
    token = (read_text(file, "write a token into it") if file else os.environ.get(TOKEN, "")).strip()
    hint = f"a new one: {secrets.token_urlsafe(24)}"
    if not token and (needed or file):
        raise ConfigError(
            f"who reaches this machine could see its pictures: give a token by --token-file, or by {TOKEN}; {hint}"
            if not file
            else f"{place} is empty; {hint}"
        )
    if token and (len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(f"{place}: a token has at least {_SHORTEST} letters, digits and signs of ASCII; {hint}")
    return token or None


def names(host: str, allowed: Sequence[str]) -> frozenset[str]:
    """Names that the service answers to, besides addresses in numbers."""
    own = [] if is_loopback(host) else [socket.gethostname(), socket.getfqdn()]
    return frozenset(name.lower().rstrip(".") for name in ("localhost", host, *own, *allowed))


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


def serve(app: object, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM, then what waits, for some seconds. ready(url): called once it answers."""
    import uvicorn

    from neucore_plugin.serve.connection import Connection

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(address(listening))

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        http=Connection,
        ws="none",
        lifespan="on",
    )
    server = Server(config)
    try:
        server.run(sockets=[listening])
    except OSError as error:
        raise FileError.of(error, address(listening)) from error
    finally:
        listening.close()
