"""The command line."""

from masa.cli.commands import main

__all__ = ["main"]
