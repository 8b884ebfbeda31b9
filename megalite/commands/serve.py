"""Answer over HTTP as OpenAI's API does, with a page to talk to the model (docs/serving.md)."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.commands.numbers import at_least, number
from megalite.commands.parser import VerbParser, add_kv_cache, add_layout, add_model, layout_of

if TYPE_CHECKING:
    from megalite.comm.mesh import Launch
    from megalite.infer.serving.settings import Settings


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--name", help="of the model, for clients (default: that of the folder)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 for all of this machine's (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=at_least(0, 65535), default=8000, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--slots",
        type=at_least(1),
        default=8,
        help="answers computed at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=at_least(2),
        default=4096,
        help="tokens of prompt and answer (default: %(default)s)",
    )
    add_kv_cache(parser)
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="keys that open the API, a line each (default: MEGALITE_API_KEY, if set)",
    )
    parser.add_argument(
        "--ratings",
        type=Path,
        default=Path("ratings"),
        help="folder for them (default: %(default)s)",
    )
    _add_other_models(parser)
    _add_limits(parser)
    _add_logs(parser)
    add_layout(parser)
    parser.set_defaults(verb=_serve)


def _add_other_models(parser: VerbParser) -> None:
    """Add the options of models beside the first."""
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="another model at the same address, asked by the name of its folder; may be repeated",
    )
    parser.add_argument(
        "--challenger",
        type=Path,
        metavar="MODEL",
        help="another model behind the same address, for an A/B test or as a shadow (docs/monitoring.md)",
    )
    parser.add_argument(
        "--share",
        type=number(0, 1),
        default=0.1,
        help="share of clients that the challenger answers, or of requests that a shadow is asked as well (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--shadow",
        action="store_true",
        help="the challenger answers nobody: what it would have said is only measured in the request log",
    )


def _add_limits(parser: VerbParser) -> None:
    """Add what bounds requests and the server's end."""
    parser.add_argument(
        "--max-request-mb", type=number(1e-6), default=1.0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--requests-per-minute",
        type=at_least(0),
        default=0,
        help="of a key or an address; 0: no limit",
    )
    parser.add_argument(
        "--timeout",
        type=number(1e-3),
        default=600.0,
        help="seconds of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=number(0),
        default=20.0,
        help="seconds to end after SIGTERM (default: %(default)s)",
    )


def _add_logs(parser: VerbParser) -> None:
    """Add what is written of requests."""
    parser.add_argument(
        "--request-log",
        type=Path,
        metavar="DIR",
        help="folder for a line a request, which `megalite monitor` reads; no texts, keys or addresses are in it",
    )
    parser.add_argument(
        "--keep-days",
        type=at_least(1),
        default=30,
        help="days after which these lines are deleted (default: %(default)s)",
    )
    parser.add_argument(
        "--log-prompts",
        action="store_true",
        help="also log what is asked, and in the request log what is answered; it is not otherwise",
    )


def _serve(arguments: argparse.Namespace) -> None:
    """Serve a model, on one device or over ranks."""
    from megalite.comm.mesh import Launch
    from megalite.errors import ConfigError

    try:
        # Looked for by name here: deep in the server a missing package would be a traceback.
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}; pip install 'megalite[serve]'") from None
    if arguments.also and arguments.challenger:
        raise ConfigError("--also and --challenger do not go together: one server does either")
    launch = Launch.from_environment()
    if launch.world_size > 1 or set(layout_of(arguments).values()) != {1}:
        _serve_on_ranks(arguments, launch)
    else:
        _serve_here(arguments)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return the server's settings. Raise ConfigError."""
    from megalite.infer.serving.guards import ADMIN_KEY_VARIABLE, read_keys
    from megalite.infer.serving.settings import Settings

    return Settings(
        name=arguments.name or _name_of(arguments.model),
        ratings=arguments.ratings,
        keys=read_keys(arguments.api_key_file),
        max_bytes=int(arguments.max_request_mb * 1e6),
        requests_per_minute=arguments.requests_per_minute,
        timeout_s=arguments.timeout,
        log_prompts=arguments.log_prompts,
        request_log=arguments.request_log,
        keep_days=arguments.keep_days,
        host=arguments.host,
        admin_key=os.environ.get(ADMIN_KEY_VARIABLE, "").strip(),
    )


def _serve_here(arguments: argparse.Namespace) -> None:
    """Serve one or more models on one device. The address is bound before the weights are read."""
    from megalite.infer.serving.by_name import make_by_name
    from megalite.infer.serving.loading import open_model
    from megalite.infer.serving.run import bind, serve
    from megalite.infer.serving.split import make_hosting

    settings = _settings(arguments)
    # Before weights are read, which takes minutes: a port that is taken is told at once.
    address = bind(arguments.host, arguments.port)
    size = arguments.slots, arguments.max_length
    kept = {"kv_cache": arguments.kv_cache}
    first, other = partial(open_model, arguments.model, *size, **kept), arguments.challenger
    second = partial(open_model, other, *size, **kept) if other else None
    make = partial(make_hosting, settings, first, second, arguments.share, arguments.shadow)
    if arguments.also:
        others = [
            (_name_of(path), partial(open_model, path, *size, **kept)) for path in arguments.also
        ]
        serve(partial(make_by_name, settings, first, others), address, arguments.grace)
    else:
        serve(make, address, arguments.grace)


def _serve_on_ranks(arguments: argparse.Namespace, launch: Launch) -> None:
    """Serve a model over ranks, which all call this; rank 0 answers. End the process, as failed
    where a rank is gone before."""
    from megalite.comm.mesh import leave
    from megalite.errors import ConfigError
    from megalite.infer.serving.ranks import follow, lead, open_on_ranks
    from megalite.infer.serving.run import bind
    from megalite.runtime.exit_codes import Exit, end_process
    from megalite.runtime.streams import flush_output

    for option, given in (("also", arguments.also), ("challenger", arguments.challenger)):
        if given:
            raise ConfigError(
                f"--{option}: a server over ranks has one model; start another for it"
            )
    size, layout = (arguments.slots, arguments.max_length), layout_of(arguments)
    if launch.rank > 0:
        generator, _ = open_on_ranks(arguments.model, *size, launch, layout, arguments.kv_cache)
        is_whole = follow(generator.model)
    else:
        settings, address = _settings(arguments), bind(arguments.host, arguments.port)
        generator, version = open_on_ranks(
            arguments.model, *size, launch, layout, arguments.kv_cache
        )
        is_whole = lead(generator, version, settings, address, arguments.grace)
    if not is_whole:
        # At once: leaving the process group could wait for a rank that is not there.
        flush_output()
        end_process(Exit.FAILED)
    leave()


def _name_of(path: Path) -> str:
    """Return a model's name for clients: that of a link, not of what it leads to, so that it is the
    same after a swap."""
    # Not `resolve`, which follows links.
    return Path(os.path.abspath(path)).name
