"""`masa app`: the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from masa.app.asked import Adapter
from masa.app.serve import HOST, PORT, serve
from masa.cli.adapter_arguments import check_weights
from masa.errors import MasaError
from masa.pipeline import StableDiffusion


def add_app(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("page")
    text = f"the address to serve on; 0.0.0.0 lets other machines in (default: {HOST}, this machine alone)"
    group.add_argument("--host", default=HOST, help=text)
    group.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT}; 0: any that is free)")
    text = "an adapter's file or folder to choose for drawn layouts; may be given several times"
    group.add_argument("--t2i-adapter", action="append", default=[], metavar="FILE", help=text)
    group.add_argument("--controlnet", action="append", default=[], metavar="FILE", help="likewise, a ControlNet's")
    group.add_argument("-q", "--quiet", action="store_true", help="no bar while the model is read")


def run_app(args: argparse.Namespace, load: Callable[[], StableDiffusion]) -> None:
    """Serve until Ctrl-C. MasaError, before the model is read, for adapters that are not there."""
    adapters = named(args.t2i_adapter, "T2I-Adapter") + named(args.controlnet, "ControlNet")
    serve(load, host=args.host, port=args.port, adapters=adapters, announce=announce)


def named(paths: Sequence[str], kind: str) -> list[Adapter]:
    """Adapters under their files' names."""
    found: list[Adapter] = []
    for path in paths:
        check_weights(path, kind)
        name = f"{Path(path).stem} ({kind})"
        if any(adapter.name == name for adapter in found):
            raise MasaError(f"two adapters are named {Path(path).stem}; rename one, so that they can be told apart")
        found.append(Adapter(name, kind, path))
    return found


def announce(address: str) -> None:
    print(f"masa: the page is at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
