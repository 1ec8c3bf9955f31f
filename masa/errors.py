"""Errors a user can act on: each names the value, what was expected and the remedy."""

from __future__ import annotations


class MasaError(ValueError):
    """Bad input: a prompt, a picture, a setting."""


class CheckpointError(MasaError):
    """A file or folder that cannot serve as the model it was given as."""
