"""The jobs of a batch: read from a file, checked as far as that needs no model, put in an order that saves work."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from masa.attention import Backend
from masa.checks import as_controls, as_prompts, check_schedule, check_targets_at_once, check_tiled, choose_first_step
from masa.controls.base import FileControl
from masa.controls.blended import BlendedLatents
from masa.controls.conditions import PictureControl
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks
from masa.errors import MasaError
from masa.guidance import check_guidance, check_guidance_scale
from masa.inversion import METHODS, check_method
from masa.io.files import file_digest, find_near
from masa.io.pictures import check_size
from masa.noise import Noise
from masa.samplers import choose_sampler
from masa.sampling import edit, sample
from masa.schedule import Schedule
from masa.settings import describe_setting, restore, restore_schedule

LONGEST_LINE = 2**26  # bytes; masks and noise are in there, packed
LONGEST_ERROR = 300  # characters
LONGEST_ID = 180  # bytes; a file system's 255 less what a hidden name beside takes

NOT_OF_JOBS = ("sd", "generator", "progress", "callback", "cache")
# Of what kind a value is in JSON, where its kind is fixed; null is what leaving it out is.
TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("source", "negative_prompt", "method", "backend", "image", "trajectory"), (str, "a text")),
    **dict.fromkeys(
        ("steps", "skip_steps", "height", "width", "seed", "targets_at_once", "inner_steps"), (int, "a whole number")
    ),
    **dict.fromkeys(("guidance_scale", "invert_guidance_scale", "eta"), ((int, float), "a number")),
    **dict.fromkeys(("pin_source", "tiled"), (bool, "true or false")),
}
# What says which source there is, beside the trajectory's own.
OF_TARGETS = ("target", "controls", "targets_at_once")
# What an inversion is made of; those that draw noise also of the seed.
OF_INVERSION: tuple[str, ...] = ("image", "source", "steps", "invert_guidance_scale", "method", "inner_steps")
OF_INVERSION += ("height", "width", "schedule", "tiled", "backend")
DRAWN = ("edit-friendly", "noise")


@cache
def keys_of(edits: bool) -> tuple[str, ...]:
    """The keys that a job may have, beside its id: arguments of `edit`, or of `sample`."""
    names = inspect.signature(edit if edits else sample).parameters
    return tuple(name for name in names if name not in NOT_OF_JOBS)


@dataclass(frozen=True)
class Job:
    """One line of a job file.

    id: the name of its folder. where: "jobs.jsonl, line 3". given: its arguments of `edit` or `sample` as JSON values.
    near: the job file, beside which its files are looked for. fingerprint: of the weights that it was pasted from, with
    their dtype, or None.
    """

    id: str
    where: str
    given: Mapping[str, Any]
    near: str
    fingerprint: tuple[str, str] | None = None
    image_sha256: str | None = None

    @property
    def digest(self) -> str:
        """What tells it from a job of the same id with other settings."""
        return hashlib.sha256(_canonical(self.given).encode()).hexdigest()[:16]

    @property
    def image(self) -> Path | None:
        """The picture that is edited. MasaError where it is not there."""
        name = self.given.get("image")
        if name is None:
            return None
        path = Path(self.near).parent / name
        if not path.is_file():
            raise MasaError(f"no picture at {path}; paths are relative to the job file")
        if self.image_sha256 is not None and file_digest(path) != self.image_sha256:
            raise MasaError(f"{path} is another picture than that of the settings that were pasted")
        return path

    @property
    def trajectory(self) -> Path | None:
        """The file of an inverted picture. MasaError where it is not there."""
        name = self.given.get("trajectory")
        path = None if name is None else Path(self.near).parent / name
        if path is not None and not path.is_file():
            raise MasaError(f"no trajectory at {path}; paths are relative to the job file")
        return path

    @property
    def inverts(self) -> bool:
        """Whether it edits a picture by way of an inversion."""
        return "image" in self.given and self.given.get("method", "ddim") in METHODS

    @property
    def steered(self) -> bool:
        """Whether a control has a condition for the source, which takes part in the inversion."""
        controls = self.given.get("controls") or ()
        listed = [controls] if isinstance(controls, Mapping) else controls
        return any(isinstance(control, Mapping) and control.get("source") is not None for control in listed)

    @property
    def inversion(self) -> str | None:
        """What an inversion that serves another job too is made of; None where none may be shared."""
        drawn = self.given.get("method") in DRAWN
        if not self.inverts or self.steered or (drawn and "seed" not in self.given):
            return None
        names = OF_INVERSION + (("seed",) if drawn else ())
        names += ("guidance_scale",) if self.given.get("method") == "null-text" else ()
        return _canonical({name: self.given[name] for name in names if name in self.given})

    @property
    def source(self) -> str | None:
        """What a source that serves another job's targets too is made of; None where none may be shared."""
        start = self.inversion is not None or "trajectory" in self.given
        noisy = bool(self.given.get("eta")) or not _sampler(self.given).retraces or self.given.get("method") in DRAWN
        seeded = noisy or not start
        if (seeded and "seed" not in self.given) or "latents" in self.given or not self.given.get("target"):
            return None
        left_out = OF_TARGETS if seeded else (*OF_TARGETS, "seed")
        return _canonical({name: value for name, value in self.given.items() if name not in left_out})

    def arguments(self) -> dict[str, Any]:
        """Its arguments as `edit` or `sample` take them, but for the trajectory, which is still a path."""
        found = {name: _restore(name, value) for name, value in self.given.items()}
        if self.image is not None:
            found["image"] = self.image
        if "controls" in found:
            found["controls"] = [self._find(control) for control in as_controls(found["controls"])]
        return found

    def _find(self, control: Any) -> Any:
        """A control with its files and pictures where they are: beside the job file, else as find_near looks."""

        def find(path: str | Path) -> Path:
            beside = Path(self.near).parent / path
            found = beside if beside.exists() else find_near(path, self.near)
            if found is None:
                raise MasaError(f"no {path}, which {type(control).__name__} names; paths are relative to the job file")
            return found

        return _with_pictures(control.found(find) if isinstance(control, FileControl) else control, find)


def _with_pictures(control: Any, find: Callable[[str | Path], Path]) -> Any:
    """A control whose pictures and masks, where they are paths, are what `find` makes of these."""

    def each(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return tuple(each(one) for one in given)
        return find(given) if isinstance(given, str | Path) else given

    if isinstance(control, PictureControl | GivenMasks):
        return replace(control, source=each(control.source), target=each(control.target))  # type: ignore[type-var]
    if isinstance(control, BlendedLatents):
        return replace(control, mask=each(control.mask))
    if isinstance(control, MasaCtrl):
        return replace(control, mask=_with_pictures(control.mask, find))
    return control


def read_jobs(jobs: str | Path | Sequence[Mapping[str, Any]]) -> list[Job]:
    """The jobs of a file of JSON lines, or of a list of the same objects, in their order.

    MasaError names the first line that is no job, and how many others there are: unknown keys, values of the wrong
    kind or out of range, ids that cannot be names of folders or come twice.
    """
    near = str(jobs) if isinstance(jobs, str | Path) else "jobs"
    found: list[Job] = []
    errors: list[str] = []
    names: dict[str, str] = {}
    for where, given in _lines(Path(jobs)) if isinstance(jobs, str | Path) else _items(jobs):
        try:
            job = make_job(given() if callable(given) else given, where, near)
            name = unicodedata.normalize("NFC", job.id).casefold()
            if name in names:
                raise MasaError(f"the id {job.id!r} is taken by {names[name]}; each job needs a folder of its own")
            names[name] = where
            check_job(job)
            found.append(job)
        except MasaError as error:
            message = f"{where}: {error}"
            errors.append(message if len(message) <= LONGEST_ERROR else message[: LONGEST_ERROR - 2] + "..")
        except RecursionError:
            errors.append(f"{where}: its values are nested too deeply")
    if errors:
        more = f" (and {len(errors) - 1} more lines are wrong)" if len(errors) > 1 else ""
        raise MasaError(errors[0] + more)
    if not found:
        raise MasaError(f"{near} holds no jobs; expected one JSON object a line")
    return found


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise MasaError(f"no job file at {path}; expected a file with one JSON object a line")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise MasaError(f"{where} is longer than {LONGEST_LINE:,} bytes; expected one JSON object a line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # Windows marks its UTF-8 so
            if line.strip():
                yield where, lambda line=line: _parse(line)


def _items(jobs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    if not isinstance(jobs, Sequence):
        raise MasaError(f"jobs is {jobs!r}; expected a file's path, or a list of jobs")
    for number, given in enumerate(jobs, 1):
        yield f"job {number}", given


def _parse(line: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise MasaError(f"{twice!r} stands there twice; leave one out")
        return found

    def refuse(name: str) -> None:
        raise MasaError(f"{name} is no number")

    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except MasaError:
        raise
    except UnicodeDecodeError as error:
        raise MasaError(f"it is no UTF-8 text ({error})") from error
    except ValueError as error:  # no JSON, or a number of too many digits
        raise MasaError(f"it is no JSON ({error}); expected one object a line, with double quotes") from error


def make_job(given: Any, where: str, near: str) -> Job:
    """A job of a line's object. MasaError for what is none, and for keys that mean nothing."""
    if not isinstance(given, Mapping):
        raise MasaError(f"it is {json.dumps(given, default=repr)[:60]}; expected an object with an id")
    name = check_id(given.get("id"))
    plain = {key: value for key, value in given.items() if key != "id"}
    fingerprint = digest = None
    if "function" in plain:
        fingerprint = (str(plain.get("fingerprint")), str(plain.get("dtype")))
        try:
            digest = (plain.get("trajectory") or {}).get("image_sha256")
            plain = _from_settings(plain)
        except (AttributeError, KeyError, TypeError) as error:
            raise MasaError(f"these settings are not whole ({type(error).__name__}: {error})") from error
    known = keys_of("image" in plain)
    for key in plain:
        if key not in known:
            near_it = difflib.get_close_matches(str(key), known, 1)
            meant = f" (is {near_it[0]!r} meant?)" if near_it else ""
            whose = "masa.edit, since there is an image" if "image" in plain else "masa.sample, since there is no image"
            raise MasaError(f"unknown {key!r}{meant}; expected id and arguments of {whose}")
    values = {key: _as_json(key, value) for key, value in plain.items() if value is not None}
    return Job(name, where, values, near, fingerprint, digest)


def _from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a result's settings were made with. MasaError where a job cannot say the same."""
    if settings.get("function") != "sample":
        raise MasaError(f"these are the settings of masa.{settings.get('function')}; expected those of one result")
    if settings.get("generator_state") is not None:
        raise MasaError("these settings took their noise from a generator; a job has a seed instead")
    plain = {key: value for key, value in settings.items() if key in keys_of(False) and key != "trajectory"}
    made_from = settings.get("trajectory")
    if made_from is None:
        return plain
    if made_from.get("trajectory") is not None:
        return plain | {"trajectory": made_from["trajectory"]}
    if made_from.get("image") is None:
        raise MasaError("the picture of these settings was no file; give its path as image, without 'function'")
    pairs = {"prompt": "source", "steps": "steps", "tiled": "tiled", "backend": "backend"}
    pairs |= {"seed": "seed"} if made_from.get("method") in DRAWN else {}
    pairs |= {"edit_guidance_scale": "guidance_scale"} if made_from.get("edit_guidance_scale") is not None else {}
    apart = [ours for theirs, ours in pairs.items() if made_from.get(theirs) != settings.get(ours)]
    apart = [name for name in apart if name != "seed" or None not in (made_from.get("seed"), settings.get("seed"))]
    if apart:
        raise MasaError(
            f"the picture was inverted with another {' and '.join(apart)} than it was edited with, which masa.edit "
            "cannot do; invert it (masa invert), and give the file as trajectory"
        )
    inverted = {name: made_from.get(name) for name in ("image", "method", "inner_steps", "height", "width")}
    seed = made_from.get("seed") if settings.get("seed") is None else settings["seed"]
    kept = {key: value for key, value in plain.items() if key in keys_of(True)}
    return kept | inverted | {"invert_guidance_scale": made_from["guidance_scale"], "seed": seed}


def check_id(name: Any) -> str:
    """The id. MasaError unless it can be the name of a folder inside the output folder, on every system."""
    if not isinstance(name, str) or not name:
        raise MasaError(f"its id is {name!r}; expected a text, the name of the job's folder")
    reason = None
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_ID:
        reason = f"is longer than {LONGEST_ID} bytes"
    elif re.search(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]', name):
        reason = "holds a character that no folder may have in its name"
    elif name.startswith("."):
        reason = "begins with a dot"
    elif name != name.strip() or name.endswith("."):
        reason = "begins or ends with a space, or ends with a dot"
    elif re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.I):
        reason = "is the name of a device on some systems"
    elif name.casefold() == "report.jsonl":
        reason = "is the report's name"
    if reason is not None:
        shown = name if len(name) <= 40 else name[:40] + ".."
        raise MasaError(f"the id {shown!r} {reason}; it names a folder inside the output folder, such as 'cat-1'")
    return name


def check_job(job: Job) -> None:
    """MasaError for values that no run can use, as far as that can be said without the model and other files."""
    for name, value in job.given.items():
        kind, expected = TYPES.get(name, (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise MasaError(f"{name} is {json.dumps(value)[:60]}; expected {expected}")
    given = {name: _restore(name, value) for name, value in job.given.items()}
    as_controls(given.get("controls", ()))
    for name in ("image", "trajectory"):
        if "\0" in given.get(name, ""):
            raise MasaError(f"{name} holds a NUL character; expected a path")
    if not isinstance(given.get("target", ""), str | list):
        raise MasaError(f"target is {json.dumps(given['target'])[:60]}; expected a prompt, or a list of prompts")
    if not as_prompts(given.get("target", ())) and "image" in given:
        raise MasaError("target is empty; an edit needs a prompt, or a list of prompts")
    check_schedule(given.get("schedule"))
    steps, schedule = given.get("steps", 50), given.get("schedule") or Schedule()
    schedule.timesteps(steps)
    choose_first_step(given.get("skip_steps"), steps, 0, from_noise=False)
    check_size(given.get("height"), given.get("width"))
    Noise(given.get("seed"))
    check_guidance_scale(given.get("guidance_scale", 7.5))
    check_guidance_scale(given.get("invert_guidance_scale", 1.0))
    check_targets_at_once(given.get("targets_at_once"))
    check_tiled(given.get("tiled"))
    choose_sampler(given.get("sampler", "ddim"))
    if "guidance" in given:
        check_guidance(given["guidance"])
    if not 0.0 <= given.get("eta", 0.0) <= 1.0:
        raise MasaError(f"eta is {given['eta']}; expected a number from 0 (deterministic) to 1")
    if given.get("inner_steps", 1) < 1:
        raise MasaError(f"inner_steps is {given['inner_steps']}; expected a whole number, 1 or more")
    if given.get("backend", "auto") not in get_args(Backend):
        raise MasaError(f"backend is {given['backend']!r}; expected one of {', '.join(get_args(Backend))}")
    if "image" in given:
        scale = given.get("guidance_scale", 7.5)
        check_method(given.get("method", "ddim"), given.get("source", ""), steps, schedule, scale)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with those beside each other that share a picture's inversion, and among these a source."""
    first: dict[str, int] = {}

    def place(key: str | None, index: int) -> int:
        return index if key is None else first.setdefault(key, index)

    places = [(place(job.inversion or job.source, i), place(job.source, i), i) for i, job in enumerate(jobs)]
    return [jobs[i] for *_, i in sorted(places)]


def shard_of(jobs: Sequence[Job], shard: tuple[int, int]) -> list[Job]:
    """The I-th of N parts of jobs in order, (1, N) the first; at most N - 1 inversions are made in two of them.

    MasaError for a part that is none.
    """
    part, parts = shard
    if not (isinstance(part, int) and isinstance(parts, int) and 1 <= part <= parts):
        raise MasaError(f"shard is {part}/{parts}; expected I/N with I from 1 to N")
    return list(jobs[(part - 1) * len(jobs) // parts : part * len(jobs) // parts])


def units_of(jobs: Sequence[Job], longest: int | None = None) -> list[list[Job]]:
    """Jobs in order, cut where no more inversion or source is shared, and into pieces of at most `longest`."""
    units: list[list[Job]] = []
    for job in jobs:
        key = job.inversion or job.source
        before = None if not units else units[-1][0].inversion or units[-1][0].source
        if key is not None and key == before and (longest is None or len(units[-1]) < longest):
            units[-1].append(job)
        else:
            units.append([job])
    return units


def _sampler(given: Mapping[str, Any]) -> Any:
    return choose_sampler(_restore("sampler", given.get("sampler", "ddim")))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _as_json(name: str, value: Any) -> Any:
    """A value as it would stand in a job file; Python's own jobs may hold controls, tensors, paths."""
    if isinstance(value, list | tuple):
        return [_as_json(name, item) for item in value]
    if value is None or isinstance(value, str | int | float | bool | Mapping):
        return value
    return describe_setting(name, value)


def _restore(name: str, value: Any) -> Any:
    """The inverse of `_as_json`. MasaError for what no class can be made of."""
    if name not in ("controls", "sampler", "guidance", "schedule", "latents"):
        return value
    try:
        return restore_schedule(value) if name == "schedule" else restore(value)
    except MasaError:
        raise
    except Exception as error:  # a class was given fields that it has not, a packed tensor is none, ..
        shown = json.dumps(value)
        shown = shown if len(shown) <= 80 else shown[:80] + ".."
        raise MasaError(
            f"{name} is {shown}, of which nothing can be made ({error}); see what results record"
        ) from error
