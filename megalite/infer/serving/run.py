"""`megalite serve`: from a checkpoint to a server, and its end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from megalite.errors import ConfigError
from megalite.infer.cache import Row, lay_out
from megalite.infer.generate import Generator
from megalite.infer.serving.app import Settings, make_app
from megalite.infer.serving.engine import Engine

LOG = logging.getLogger("megalite.serve")
LAST_S = 2.0
"""After the answers were cut off: for responses to reach their clients."""


class Server(uvicorn.Server):
    """On SIGTERM and SIGINT it takes on nothing more, and gives answers under way `grace_s` to end; a second SIGINT
    ends it at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float):
        super().__init__(config)
        self._engine, self._grace_s = engine, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a thread: this one may hold the lock that it takes.
        threading.Thread(target=self._engine.close, args=(self._grace_s,)).start()
        super().handle_exit(sig, frame)


def reserve(host: str, port: int) -> socket.socket:
    """The address, for `serve`: to be known free before a model is loaded. Raises ConfigError."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise ConfigError(f"cannot serve on {host}:{port}: {reason}; --port and --host say where else") from None
    return taken


def serve(generator: Generator, settings: Settings, address: socket.socket, grace_s: float) -> None:
    """Until a signal ends it. `address` is of `reserve`."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    warm_up(generator)
    app = make_app(generator, settings)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=round(grace_s + LAST_S), timeout_keep_alive=30,
    )  # fmt: skip
    server = Server(config, app.state.engine, grace_s)
    # uvicorn raises the signal again when all is done: it has done its work by then.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    protected = f"{len(settings.keys)} API keys" if settings.keys else "open to all: no API key is set"
    host, port = address.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    LOG.info("%s on %s (%s); ratings go to %s", settings.name, url, protected, settings.ratings)
    server.run([address])


def warm_up(generator: Generator) -> None:
    """Take the memory of all slots' longest sequences now, rather than fail for want of it later."""
    model = generator.model
    model.predict(*lay_out([Row(0, model.capacity - 1, [0], model.capacity)], model.device))
