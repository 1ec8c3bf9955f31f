"""The denoising loop: a run that is ready, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masa.attention import Backend
from masa.branches import SOURCE, Branches
from masa.cache.source_cache import SourceCache
from masa.controls.base import ActiveControl, resolve
from masa.edits import Edit, Residuals, Tape, take
from masa.errors import MasaError
from masa.guidance import Guidance, guide
from masa.models.batch_rows import Retirement
from masa.pipeline import StableDiffusion
from masa.samplers.base import History, Levels, Solver
from masa.schedule import find_eps, predict_x0

Callback = Callable[[int, int, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Denoising:
    """One run, ready to go: everything `denoise` needs, checked."""

    sd: StableDiffusion
    levels: Levels
    solver: Solver
    latents: Tensor  # (1 + N, 4, h, w): the start
    contexts: tuple[Context, ...]  # of each step
    guidance: Guidance
    guidance_scale: float
    draw_noise: Callable[[], Tensor]  # (1, 4, h, w)
    source_guidance: float | None = None  # None: guidance_scale
    first_step: int = 0
    controls: tuple[ActiveControl, ...] = ()
    pinned: Tensor | None = None  # a trajectory's latents, which the source's are replaced by
    retraces: bool = True  # a pinned source is computed at the last step: its reconstruction
    noise: Tensor | None = None  # (steps, 4, h, w), added by each step instead of fresh noise
    backend: Backend = "auto"
    callback: Callback | None = None
    cache: SourceCache | None = None  # has what the targets read of the source, which is not computed
    targets_at_once: int | None = None
    embedded_guidance: Tensor | None = None  # of a model that is told its guidance, and has no halves

    @property
    def steps(self) -> int:
        return self.levels.steps


@dataclass(frozen=True)
class Batch:
    """One call of the UNet: its rows, their edits, those that leave on the way and those whose eps is wanted."""

    branches: Branches
    edits: dict[int, Edit]
    retire: Retirement | None
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """One step's rows and their prompts' embeddings."""

    branches: Branches
    uncond: Tensor  # (1, 77, width)
    cond: Tensor  # (1 + N, 77, width)


def denoise(run: Denoising) -> Iterator[Tensor]:
    """The latents (1 + N, 4, h, w) after each step; the caller owns the progress. MasaCtrl algorithm 1."""
    x = run.latents
    history: History = ()
    for step, timestep in list(enumerate(run.levels.timesteps))[run.first_step :]:
        last = step == run.steps - 1
        if run.pinned is not None:
            x = torch.cat([_pinned_at(run, step), x[1:]])
        eps, present, tape, branches = _predict(run, x, step, timestep, _plan_step(run, step, last))
        eps, x0 = _complete(run, x, eps, present, step)
        noise = _step_noise(run, step).to(x.device) if run.solver.draws_noise else None
        moved, history = run.solver.step(step, x, eps, x0, history, noise)
        x = torch.cat([_source_after(run, x0, moved, present, step).to(x.device), moved[1:]])
        for control in run.controls:
            control.see_prediction(step, x0)
            x = _moved(run, control, x, control.after_step(step, x, tape, branches))
            history = tuple(control.blend(kept) for kept in history)
        if run.callback is not None:
            x = _call_back(run, run.callback, step, round(timestep), x)
        yield x


def _complete(run: Denoising, x: Tensor, eps: Tensor, present: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """Guided eps and clean latents (1 + N, 4, h, w) of all branches, from the eps of those present.

    A source that was not computed counts as predicted to be where it ends: its trajectory's picture, or what its
    recording predicted.
    """
    a = run.levels.alphas[step]
    x0 = predict_x0(eps, take(x, present), a)  # indexing by a list would copy it to the device and wait
    if len(present) == len(x):
        return eps, x0
    known = (run.cache.predicted(step) if run.cache is not None else _pinned_at(run, run.steps)).to(x.device)
    return torch.cat([find_eps(known, x[:1], a), eps]), torch.cat([known, x0])


def _plan_step(run: Denoising, step: int, last: bool) -> list[Batch]:
    """The UNet's calls in a step, leaving out source rows that nobody reads.

    A pinned source, or one that an earlier call has predicted, is computed only for the targets to read it; a
    pinned one also at the last step, which gives its reconstruction. It leaves the batch in the last edited layer.
    """
    batches = []
    unet = run.sd.unet
    for part, branches in enumerate(_parts(run, step)):
        rows, targets = tuple(range(len(branches))), branches.without_source()
        source = tuple(row for row in rows if row not in targets)
        edits = resolve(run.controls, step, branches, unet.sites)
        if run.cache is not None or (part == 0 and (run.pinned is None or (last and run.retraces))):
            batches.append(Batch(branches, edits, None, rows))
        elif not targets:  # a pinned source is recorded, or nobody wants it
            batches.append(Batch(branches if edits else branches.select(()), edits, None, ()))
        elif any(edit.reads_others(targets, source) for edit in edits.values()):
            last_layer = max(unet.sites[index].layer for index in edits)
            retire = Retirement(last_layer, targets) if last_layer < unet.layers else None
            batches.append(Batch(branches, edits, retire, targets))
        else:
            alone = branches.select(targets)
            edits = resolve(run.controls, step, alone, unet.sites) if edits else {}
            batches.append(Batch(alone, edits, None, tuple(range(len(targets)))))
    return batches


def _parts(run: Denoising, step: int) -> tuple[Branches, ...]:
    """The rows of a step in as many parts as there are calls of the UNet."""
    branches = run.contexts[step].branches
    return (branches if run.cache is None else branches.cache_source()).parts(run.targets_at_once)


def _predict(
    run: Denoising, x: Tensor, step: int, timestep: float, batches: Sequence[Batch]
) -> tuple[Tensor, tuple[int, ...], Tape, Branches]:
    """Guided eps (branches present, 4, h, w), the branches present, and all calls' tape with the rows it is of."""
    context, tapes = run.contexts[step], []
    predicted: dict[int, Tensor] = {}
    for batch in batches:
        branches, edits, tape = batch.branches, batch.edits, {}
        if run.cache is not None:  # here, so that one call's tensors are on the device at a time
            rows, device = len(branches), run.sd.device
            edits = {site: run.cache.attach(edit, step, site, rows, device) for site, edit in edits.items()}
        if len(branches):
            prompts = branches.contexts(context.uncond, context.cond)
            eps, tape = run.sd.unet(
                take(x, branches.present).to(run.sd.dtype).contiguous(),  # one layout for all steps
                timestep,
                prompts,
                edits,
                retire=batch.retire,
                backend=run.backend,
                copies=branches.copies,
                residuals=_residuals(run, x, step, timestep, prompts, branches),
                guidance=run.embedded_guidance,
            )
            wanted = branches.select(batch.wanted)
            eps = (eps if batch.retire is not None else take(eps, batch.wanted)).float()
            if len(wanted):
                guided = guide(wanted, eps, run.guidance, step, run.guidance_scale, run.source_guidance)
                predicted.update(zip(wanted.present, guided, strict=True))
        tapes.append(tape)
    present = tuple(sorted(predicted))
    eps = torch.stack([predicted[branch] for branch in present]) if present else x[:0]
    return eps, present, *_join_tapes(batches, tapes)


def _residuals(
    run: Denoising, x: Tensor, step: int, timestep: float, prompts: Tensor, branches: Branches
) -> Residuals | None:
    """The sum of what controls add to the network's features for these rows."""
    if not run.controls:
        return None
    latents = torch.cat([x[row.branch : row.branch + 1] for row in branches.rows]).to(run.sd.dtype)
    found = []
    for control in run.controls:
        added = control.residuals(step, timestep, latents, prompts, branches)
        if added is not None:
            _check_rows(control, added, len(branches))
            found.append(added)
    return Residuals.total(found)


def _check_rows(control: ActiveControl, added: Residuals, rows: int) -> None:
    """MasaError unless a control's residuals have a row for each of the batch."""
    for tensor in (*added.down, *added.skips, added.mid):
        if tensor is not None and len(tensor) != rows:
            raise MasaError(f"{control.name} adds residuals {tuple(tensor.shape)} to {rows} rows; give one for each")


def _join_tapes(batches: Sequence[Batch], tapes: Sequence[Tape]) -> tuple[Tape, Branches]:
    """The tapes of several calls as if of one: each row as the first call that has it wrote it."""
    if len(batches) == 1:
        return tapes[0], batches[0].branches
    if any(tape.keys() != tapes[0].keys() for tape in tapes):
        raise MasaError("a control records in some calls of a step only; with targets_at_once it must ask each alike")
    first = {row: (n, i) for n, b in reversed(list(enumerate(batches))) for i, row in enumerate(b.branches.all_rows)}
    cached = batches[0].branches.cached
    halves = [[row for row in first if row not in cached and row.halves[0] == half] for half in ("uncond", "cond")]
    rows = tuple(row for half in halves for row in sorted(half, key=lambda row: row.branch))
    places = [first[row] for row in (*rows, *cached)]
    joined = {key: torch.cat([tapes[n][key][i : i + 1] for n, i in places]) for key in tapes[0]}
    return joined, Branches(rows, cached)


def _source_after(run: Denoising, x0: Tensor, moved: Tensor, present: tuple[int, ...], step: int) -> Tensor:
    """The source's latents (1, 4, h, w) when a step is done; moved (1 + N, 4, h, w): where the sampler puts them."""
    if SOURCE not in present:  # where it was recorded, or where its trajectory is
        return run.cache.source_after(step) if run.cache is not None else _pinned_at(run, step + 1)
    # A pinned source has no history to go on with: its reconstruction is what it is predicted to be.
    return x0[:1] if run.pinned is not None and run.solver.keeps_history else moved[:1]


def _pinned_at(run: Denoising, step: int) -> Tensor:
    """The trajectory's latents (1, 4, h, w) before a step."""
    assert run.pinned is not None
    return run.pinned[run.steps - step][None]


def _step_noise(run: Denoising, step: int) -> Tensor:
    """The trajectory's noise, or fresh; the same for every branch: N targets together equal N targets alone."""
    return run.draw_noise() if run.noise is None else run.noise[step][None]


def _moved(run: Denoising, control: ActiveControl, before: Tensor, after: Tensor) -> Tensor:
    """The latents that a control gives. MasaError for what are none, and for another source than a cache holds."""
    if not isinstance(after, Tensor) or after.shape != before.shape:
        got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise MasaError(f"{control.name} gave {got} after a step; expected latents {tuple(before.shape)}")
    if run.cache is not None and after is not before and not torch.equal(after[:1], before[:1]):
        raise MasaError(f"{control.name} changes the source's latents, which a cache holds as recorded; run without it")
    return after


def _call_back(run: Denoising, callback: Callback, step: int, timestep: int, x: Tensor) -> Tensor:
    changed = callback(step, timestep, x)
    if changed is None:
        return x
    if not isinstance(changed, Tensor) or changed.shape != x.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise MasaError(f"the callback returned {got}; expected None or latents {tuple(x.shape)}")
    changed = changed.to(x)
    if run.cache is not None and not torch.equal(changed[:1], x[:1]):
        raise MasaError("the callback changes the source's latents, which a cache holds; run without cache=")
    return changed


def check_together(run: Denoising) -> None:
    """MasaError where two controls are at odds, or edits do not fit, in any call of any step of a run."""
    for step in range(run.first_step, run.steps):
        for branches in _parts(run, step):
            resolve(run.controls, step, branches, run.sd.unet.sites)


def check_cache(run: Denoising, cache: SourceCache, source_conditions: Sequence[str | None]) -> None:
    """MasaError where a run needs of its source what the cache has not; source_conditions: of each control."""
    if len(run.latents) == 1:
        raise MasaError("cache serves targets, and there are none; give one, or run without cache=")
    if run.first_step != cache.first_step and not (cache.pinned and run.first_step > cache.first_step):
        raise MasaError(
            f"the run starts at step {run.first_step}, and the cache was recorded from step {cache.first_step} on; "
            "record with skip_steps to match"
        )
    for control in run.controls:
        if control.watches_source:
            raise MasaError(f"{control.name} keeps what only a computed source has; run without cache=")
    cache.check_conditions(source_conditions)
    for step in range(run.first_step, run.steps):
        for branches in _parts(run, step):
            for control in run.controls:
                cache.check_edits(control, step, branches, run.sd.unet.sites)
