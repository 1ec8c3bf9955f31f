"""What the page's buttons do: plain functions of values, that give progress as they go and an outcome in the end."""

from __future__ import annotations

import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from masa.app.asked import Adapter, Asked, Defaults, picture_digest
from masa.app.drawings import heat_over, mask_over, word_mask
from masa.app.sessions import Found, Inverted, Outcome, Recorded, Session, Sessions
from masa.app.work import Done, Phase, Progress, Ticket, Worker
from masa.cache.source_cache import SourceCache
from masa.controls.base import Control
from masa.controls.live_preview import LivePreview
from masa.controls.record import RecordAttention
from masa.denoising import denoise
from masa.errors import MasaError
from masa.inversion import invert
from masa.output.result import Result
from masa.pipeline import StableDiffusion
from masa.sampling import Given, prepare, sample
from masa.settings import RunSettings
from masa.trajectory import Trajectory
from masa.workflows.recording import record
from masa.workflows.sheets import label_sheet

T = TypeVar("T")
MAP_STEPS = 3  # noise levels at which a word is looked for on a picture


@dataclass(frozen=True, eq=False)
class Desk:
    """What all tabs share: a model, its one worker, adapters, and each tab's own."""

    sd: StableDiffusion
    sessions: Sessions
    adapters: tuple[Adapter, ...] = ()
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "worker", Worker(self.sd))

    @property
    def defaults(self) -> Defaults:
        return Defaults.of(self.sd)


def run(desk: Desk, session: Session, asked: Asked) -> Iterator[Progress | Outcome]:
    """Synthesise or edit as asked, by each of the methods from the same noise.

    Gives progress, then the outcome, which the session keeps. MasaError for bad input, Cancelled for a run that was
    stopped: then nothing is kept or left behind but what it had inverted.
    """
    asked.check()
    yield from _follow(desk, session, partial(_run, desk, session, asked))


def find_mask(desk: Desk, session: Session, asked: Asked) -> Iterator[Progress | Image.Image]:
    """The picture (or the last source) with the mask of the source's word on it.

    The word's attention at three levels of noise; a run finds it anew at each step. Kept: another threshold costs
    nothing.
    """
    picture = asked.fitted
    if picture is None:
        if session.outcome is None:
            raise MasaError("there is no picture to show a mask on yet; give one, or run once")
        picture = session.outcome.results[0][1].source.convert("RGB")
    if not asked.word_source:
        raise MasaError("name the word of the source prompt whose mask is to be shown, such as cat")
    key = f"{picture_digest(picture)} {asked.source!r} {asked.word_source!r}"
    if session.found is None or session.found.key != key:
        work = partial(_find_word, desk.sd, picture, asked.source, asked.word_source)
        for told in _follow(desk, session, work):
            if isinstance(told, Progress):
                yield told
            else:
                session.found = Found(key, picture, told)
    yield mask_again(session, asked.threshold)


def mask_again(session: Session, threshold: float) -> Image.Image:
    """The mask that was found last, cut at another threshold."""
    if session.found is None:
        raise MasaError("no mask was found yet; press Show the mask")
    size = (session.found.picture.height, session.found.picture.width)
    return mask_over(session.found.picture, word_mask(session.found.map, threshold, size))


def _follow(desk: Desk, session: Session, work: Callable[[Ticket], T]) -> Iterator[Progress | T]:
    """Do the work in its turn, so that the session's Cancel reaches it."""
    with session.working() as ticket:
        for told in desk.worker.follow(work, ticket):
            yield told.value if isinstance(told, Done) else told


# ------------------------------------------------------------------------------------------- in the worker's thread


def _run(desk: Desk, session: Session, asked: Asked, ticket: Ticket) -> Outcome:
    began = time.monotonic()
    methods = asked.controls(desk.adapters)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    key = asked.source_key(seed, methods)
    # It pays where the source would be run again: for several methods, or for the second prompt.
    pays = asked.reuse and bool(asked.prompts) and any(methods.values())
    recorded = session.recorded if pays and session.recorded is not None and session.recorded.key == key else None
    records = recorded is None and pays and (len(methods) > 1 or session.asked_before == key)
    kept = None if asked.picture is None else session.inverted.get(asked.inversion_key())
    ticket.plan(_phases(asked, methods, kept is None, records, recorded is not None or records))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inverted = kept
        if asked.picture is not None and kept is None:
            ticket.begin()
            inverted = _invert(desk.sd, asked, seed)
            session.keep_inverted(asked.inversion_key(), inverted)
        trajectory = None if inverted is None else inverted.trajectory
        if records:
            session.recorded = None  # its memory serves the new one
            ticket.begin()
            recorded = Recorded(key, _record(desk.sd, asked, seed, trajectory, methods))
        cache = None if recorded is None else recorded.cache
        results = []
        for name, controls in methods.items():
            ticket.begin()
            results.append((name, _sample(desk.sd, asked, seed, trajectory, cache, controls, ticket)))
        ticket.check()
    said = [*(inverted.warnings if inverted is not None else ()), *(str(w.message) for w in caught if _ours(w))]
    shown, files = _save(session.new_folder(), results, ticket)
    if recorded is not None:
        desk.sessions.keep_recorded(session, recorded)
    session.asked_before = key
    notes = tuple(dict.fromkeys(said))
    session.outcome = Outcome(tuple(results), shown, files, notes, time.monotonic() - began, cache is not None)
    return session.outcome


def _ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning)


def _phases(
    asked: Asked, methods: Mapping[str, Sequence[Control]], inverts: bool, records: bool, cached: bool
) -> list[Phase]:
    """What a run is going to do: UNet rows are a guess, which is mended as calls are counted."""
    halves = 2 if asked.guidance > 1.0 else 1
    phases = []
    if asked.picture is not None and inverts:
        # Null-text takes a gradient at each step, some ten times.
        calls = asked.steps * (12 if asked.inverter == "null-text" else 1)
        phases.append(Phase("inverting the picture", calls))
    if records:
        phases.append(Phase("recording the source", asked.steps, halves))
    rows = halves * (len(asked.prompts) + (0 if cached else 1))
    return phases + [Phase(name or "synthesis", asked.steps, rows) for name in methods]


def _invert(sd: StableDiffusion, asked: Asked, seed: int) -> Inverted:
    picture = asked.fitted
    assert picture is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trajectory = invert(
            sd,
            picture,
            asked.source,
            steps=asked.steps,
            method=asked.inverter,
            edit_guidance_scale=asked.guidance,
            seed=seed,
            height=asked.height,
            width=asked.width,
            progress=False,
        )
    # PNGs made from it carry the picture: they rerun wherever they are.
    return Inverted(trajectory.with_picture(picture), tuple(str(w.message) for w in caught if _ours(w)))


def _start(asked: Asked, seed: int, trajectory: Trajectory | None) -> dict[str, object]:
    """Where a source starts from."""
    if trajectory is not None:
        return {"trajectory": trajectory, "seed": seed}
    return {"seed": seed, "steps": asked.steps, "height": asked.height, "width": asked.width}


def _record(
    sd: StableDiffusion,
    asked: Asked,
    seed: int,
    trajectory: Trajectory | None,
    methods: Mapping[str, Sequence[Control]],
) -> SourceCache:
    reading = [control for controls in methods.values() for control in controls]
    start = _start(asked, seed, trajectory)
    return record(
        sd,
        asked.source,
        controls=reading,
        guidance_scale=asked.guidance,
        negative_prompt=asked.negative,
        sampler=asked.sampler,
        progress=False,
        **start,  # type: ignore[arg-type]
    )


def _sample(
    sd: StableDiffusion,
    asked: Asked,
    seed: int,
    trajectory: Trajectory | None,
    cache: SourceCache | None,
    controls: Sequence[Control],
    ticket: Ticket,
) -> Result:
    names = ("source", *asked.prompts)
    looking: list[Control] = [LivePreview(lambda _step, pictures: ticket.show(names, pictures))]
    if asked.keep_maps:
        looking.append(RecordAttention())
    every = [*controls, *looking]
    if cache is not None:
        return sample(sd, target=asked.prompts, cache=cache, controls=every, progress=False)
    return sample(
        sd,
        asked.source,
        asked.prompts,
        controls=every,
        guidance_scale=asked.guidance,
        negative_prompt=asked.negative,
        sampler=asked.sampler,
        progress=False,
        **_start(asked, seed, trajectory),  # type: ignore[arg-type]
    )


def _find_word(sd: StableDiffusion, picture: Image.Image, prompt: str, word: str, ticket: Ticket) -> Tensor:
    """A word's attention map (h, w) on a picture, from a few levels of noise: no inversion, no decoding."""
    ticket.plan([Phase("looking for the word", MAP_STEPS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run says what there is to say of the picture
        noisy = invert(
            sd, picture, prompt, steps=MAP_STEPS, method="noise", seed=0, progress=False, height=picture.height,
            width=picture.width,
        )  # fmt: skip
    ticket.begin()
    settings = RunSettings(source=prompt, controls=(RecordAttention(words=[word]),), guidance_scale=1.0)
    with torch.no_grad():
        prepared = prepare(sd, settings, Given(noisy, progress=False))
        for _ in denoise(prepared.denoising):
            pass
    return prepared.denoising.controls[0].attention()[word][0].float().cpu()


# ----------------------------------------------------------------------------------------------------- what is shown


def _save(
    folder: Path, results: Sequence[tuple[str, Result]], ticket: Ticket
) -> tuple[tuple[tuple[Path, str], ...], tuple[Path, ...]]:
    """PNGs that carry their settings: all pictures and, of several, a sheet. Returns those to show, and all files."""
    ticket.check()
    source = results[0][1].source
    shown = [(folder / "source.png", "source")]
    source.save(shown[0][0])
    for name, result in results:
        for i, target in enumerate(result.targets):
            path = folder / f"{_plain(name)}_{i}.png"
            target.save(path)
            shown.append((path, _label(name, result, i)))
    files = [path for path, _ in shown]
    if len(files) > 2:
        rows = [[source, *result.targets] for _, result in results]
        files.append(folder / "sheet.png")
        label_sheet(rows, [name for name, _ in results], results[0][1].labels).save(files[-1])
    return tuple(shown), tuple(files)


def _label(name: str, result: Result, target: int) -> str:
    """Of a target's picture: its method, and its prompt where there are several."""
    return name if len(result.targets) == 1 else f"{name}: {result.labels[target + 1]}"


def _plain(name: str) -> str:
    """A method's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def words_of(outcome: Outcome) -> list[str]:
    """The words of an outcome's prompts, whose attention can be shown, in order."""
    settings = outcome.results[0][1].settings
    found: dict[str, None] = {}
    for prompt in (settings["source"], *settings["target"]):
        found |= dict.fromkeys(word.lower() for word in re.findall(r"\w+(?:['’-]\w+)*", prompt))
    return list(found)


def attention_of(sd: StableDiffusion, outcome: Outcome, word: str) -> list[tuple[str, Image.Image]]:
    """Each picture lit where a word looked during its run: source, then targets by method.

    MasaError where no maps were kept, or no prompt has the word.
    """
    lit = []
    for place, (name, result) in enumerate(outcome.results):
        maps = next((kept[""] for kept in result.attention.values() if "" in kept), None)
        if maps is None:
            raise MasaError("this run kept no attention maps; tick Keep attention maps and run again")
        for branch, (picture, prompt) in enumerate(zip(result.images, _prompts(result), strict=True)):
            if branch == 0 and place > 0:
                continue  # all methods have one source
            try:
                tokens = sd.tokenizer.token_positions(prompt, word)
            except MasaError:
                continue
            label = "source" if branch == 0 else _label(name, result, branch - 1)
            lit.append((label, heat_over(picture, maps[branch, list(tokens)].sum(0))))
    if not lit:
        raise MasaError(f"no prompt of this run has the word {word!r}")
    return lit


def masks_of(outcome: Outcome) -> list[tuple[str, Image.Image]]:
    """Each picture with the mask that its last controlled step used; nothing where a run used none."""
    tinted = []
    for name, result in outcome.results:
        for by_step in result.masks.values():
            last = by_step[max(by_step)]
            labels = ["source", *(_label(name, result, i) for i in range(len(result.targets)))]
            tinted += [(label, mask_over(p, m)) for label, p, m in zip(labels, result.images, last, strict=True)]
    return tinted


def settings_of(outcome: Outcome) -> list[tuple[str, str]]:
    """An outcome's settings as a table: what was asked, and what was drawn or chosen where nothing was said."""
    settings = outcome.results[0][1].settings
    size = outcome.results[0][1].source
    inverted = settings["trajectory"]
    rows = [
        ("source", settings["source"] or "(empty prompt)"),
        *((f"target {i + 1}", prompt) for i, prompt in enumerate(settings["target"])),
        *((name or "controls", _told(result)) for name, result in outcome.results),
        ("picture", f"inverted by {inverted['method']}" if inverted is not None else "synthesised"),
        ("steps", str(settings["steps"])),
        ("guidance", str(settings["guidance_scale"])),
        ("negative prompt", settings["negative_prompt"] or "(none)"),
        ("seed", "none was needed" if settings["seed"] is None else str(settings["seed"])),
        ("sampler", _named(settings["sampler"])),
        ("size", f"{size.width}x{size.height}"),
        ("model", f"{settings['checkpoint']}, {settings['dtype']} on {settings['device']}"),
        ("took", f"{outcome.seconds:.1f} s"),
        ("rerun", "up to rounding: the source was recorded (Reuse the source)" if outcome.recorded else "exact"),
    ]
    return rows


def _told(result: Result) -> str:
    """A result's controls in words."""
    told = [_named(control) for control in result.settings["controls"] if control["kind"] != "RecordAttention"]
    return ", ".join(told) or "nothing: the same noise"


def _named(described: Mapping[str, object]) -> str:
    """A described value as one would write it in Python, without pictures and what is left at None."""
    values = []
    for name, value in described.items():
        if name == "kind" or value is None or value == {"kind": "mapping", "items": []}:
            continue
        if isinstance(value, Mapping):
            value = _named(value) if "kind" in value else "(picture)"
        elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = "(pictures)"
        elif isinstance(value, str) and name == "sha256":
            continue
        values.append(f"{name}={value}")
    return f"{described['kind']}({', '.join(values)})"


def _prompts(result: Result) -> list[str]:
    return [result.settings["source"], *result.settings["target"]]
