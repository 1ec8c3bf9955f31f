"""Samplers, guidance and classes of a user's on the command line: --plugin, --sampler, --guidance-rule, --set."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from masa.errors import MasaError
from masa.guidance import Guidance, GuidanceInterval, RescaledGuidance
from masa.samplers import NAMES
from masa.samplers.base import Sampler
from masa.settings import KINDS, registered, restore

Value = TypeVar("Value")
# A class, one of its fields and the value that the field is to have.
Field = tuple[str, str, Any]


def add_plugins(parser: argparse.ArgumentParser) -> None:
    text = "a Python file of yours that calls masa.register; may be given several times"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help=text)


def add_fields(group: argparse._ArgumentGroup) -> None:
    text = "a field of a control, sampler or guidance that is in use, as JSON: DPMSolverPP.karras=true"
    form = "CLASS.FIELD=VALUE"
    group.add_argument("--set", dest="set", type=parse_field, action="append", default=[], metavar=form, help=text)


def add_sampler(group: argparse._ArgumentGroup) -> None:
    text = f"{', '.join(NAMES)}, or a registered class's name (default: ddim)"
    group.add_argument("--sampler", type=parse_sampler, metavar="NAME", help=text)
    text = "bring guided predictions back to their size: the share of it, 0 to 1, such as 0.7"
    group.add_argument("--guidance-rescale", type=float, metavar="PHI", help=text)
    text = "guide only these steps, END not among them; the others take half the time"
    group.add_argument("--guidance-interval", nargs=2, type=int, metavar=("START", "END"), help=text)
    group.add_argument("--guidance-rule", type=parse_rule, metavar="NAME", help="a registered guidance class's name")


def load_plugins(argv: Sequence[str]) -> None:
    """Import the files that --plugin names, before anything else is parsed: names that they register are arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_plugins(parser)
    try:
        files = parser.parse_known_args(list(argv))[0].plugin
    except argparse.ArgumentError:
        return  # the command's own parser says what is wrong
    for file in files:
        load_plugin(Path(file))


def load_plugin(path: Path) -> None:
    """Import a user's file. MasaError where it is not there, fails, or registers nothing."""
    if path.suffix != ".py" or not path.is_file():
        raise MasaError(f"--plugin {path} is no Python file; give one that calls masa.register")
    name = f"masa_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except MasaError:
        raise
    except Exception as error:
        raise MasaError(f"--plugin {path} failed: {type(error).__name__}: {error}") from error
    if not any(kind.__module__ == name for kind in KINDS.values()):
        raise MasaError(f"--plugin {path} registers nothing; call masa.register on its classes")


def build_sampler(args: argparse.Namespace) -> Sampler:
    """The sampler that the options describe, but for --set."""
    name = "ddim" if args.sampler is None else args.sampler
    return NAMES[name] if name in NAMES else make(name, args.set)


def build_guidance(args: argparse.Namespace) -> Guidance | None:
    """The guidance that the options describe, but for --set; None where they say nothing."""
    if args.guidance_rule is not None and args.guidance_rescale is not None:
        raise MasaError("--guidance-rule and --guidance-rescale both say how halves become one; leave one out")
    rule = None if args.guidance_rule is None else make(args.guidance_rule, args.set)
    if args.guidance_rescale is not None:
        rule = RescaledGuidance(args.guidance_rescale)
    rule = None if rule is None else with_fields(rule, args.set)
    if args.guidance_interval is None:
        return rule
    return GuidanceInterval(*args.guidance_interval, **({} if rule is None else {"within": rule}))


def make(name: str, given: Iterable[Field]) -> Any:
    """A value of a registered class, with the fields that --set gives it."""
    try:
        return KINDS[name](**fields_of(name, given))
    except TypeError as error:
        raise MasaError(f"{name} cannot be made: {error}; give its fields as --set {name}.FIELD=VALUE") from error


def with_fields(value: Value, given: Iterable[Field]) -> Value:
    """A value with the fields that --set gives its class."""
    changes = fields_of(type(value).__name__, given)
    return replace(value, **changes) if changes else value  # type: ignore[type-var]


def fields_of(name: str, given: Iterable[Field]) -> dict[str, Any]:
    """What --set says of a class. MasaError for a field that it has not."""
    known = {field.name: field for field in fields(KINDS[name]) if field.init}
    found = {field: value for kind, field, value in given if kind == name}
    for field, value in found.items():
        if field not in known:
            raise MasaError(f"--set {name}.{field}: {name} has {', '.join(known) or 'no fields'}")
        check_kind(f"--set {name}.{field}", value, known[field].default)
    return found


def check_kind(option: str, value: Any, default: Any) -> None:
    """MasaError for a value of another kind than a field's default, where that is a truth value, number or text."""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), f"a number such as {default}"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), f"a text such as {default}"
    else:
        return
    if not fits and value is not None:
        raise MasaError(f"{option} is {value!r}; expected {expected}")


def check_used(given: Iterable[Field], used: Iterable[Any]) -> None:
    """MasaError for a --set of a class that is not in use."""
    names = {type(value).__name__ for value in used}
    for kind, field, value in given:
        if kind not in names:
            shown = f"--set {kind}.{field}={json.dumps(value)}"
            raise MasaError(f"{shown}: no {kind} is in use, but {', '.join(sorted(names)) or 'nothing'}; name it first")


def parse_field(text: str) -> Field:
    """ "Mine.start=3" -> ("Mine", "start", 3); what is no JSON is a text."""
    place, equals, value = text.partition("=")
    kind, dot, field = place.partition(".")
    if not (equals and dot and kind and field):
        raise argparse.ArgumentTypeError(f"{text!r} is not CLASS.FIELD=VALUE, such as DPMSolverPP.karras=true")
    value = {"True": "true", "False": "false", "None": "null"}.get(value, value)  # as Python writes them
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return kind, field, value
    plain = isinstance(parsed, Mapping) and "kind" not in parsed
    return kind, field, parsed if plain else restore(parsed)


def parse_sampler(text: str) -> str:
    return choose(text, [*NAMES, *registered("start")], "sampler")


def parse_rule(text: str) -> str:
    return choose(text, list(registered("guide")), "guidance")


def choose(text: str, names: Sequence[str], what: str) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}; expected one of {', '.join(names)}")
    return text
