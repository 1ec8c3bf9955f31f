"""Classes of a user's: registered ones take part everywhere, others are refused by name where they would be lost."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import masa
from masa.cli.arguments import build_parser
from masa.cli.commands import main
from masa.cli.registered_arguments import parse_field
from masa.controls import FileControl
from masa.output.result import Picture, read_settings
from masa.samplers.base import Levels, Solver
from masa.settings import KINDS, RunSettings, describe, restore

SETTINGS = {"steps": 3, "height": 64, "width": 64, "seed": 1, "progress": False}
PROMPTS = ("a photo of a cat", "a dog")


@pytest.fixture(autouse=True)
def registered_here():
    """What a test registers is forgotten after it."""
    kept = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(kept)


@dataclass(frozen=True)
class Mine:
    """A control: MasaCtrl from a step on, by a name of its own."""

    start_step: int = 1
    layers: tuple[int, ...] = (10, 11)
    mask: masa.WordMasks | None = None

    def begin(self, run):
        return masa.MasaCtrl(self.start_step, layers=self.layers, mask=self.mask).begin(run)


@dataclass(frozen=True)
class Stronger(masa.Guidance):
    factor: float = 2.0

    def guide(self, uncond, cond, scale, step):
        return uncond + self.factor * scale * (cond - uncond)


@dataclass(frozen=True)
class Plain(masa.Sampler):
    """DDIM on trailing timesteps, in its plainest form."""

    shift: int = 0

    def levels(self, schedule, steps, fixed=None):
        timesteps = tuple(round(1000 - 1000 * k / steps) - 1 - self.shift for k in range(steps))
        return fixed or Levels(schedule, timesteps, (*map(schedule.alpha, timesteps), schedule.alpha(0)))

    def start(self, levels, eta):
        return Steps(levels)


@dataclass(frozen=True)
class Steps(Solver):
    levels: Levels

    def step(self, step, x, eps, x0, history, noise):
        a = self.levels.alphas[step + 1]
        return a**0.5 * x0 + (1 - a) ** 0.5 * eps, ()


@dataclass(frozen=True)
class Denser(masa.Schedule):
    """Steps that lie closer together, and begin less noisy."""

    share: float = 0.8

    def stride(self, steps):
        return int(self.share * super().stride(steps))


def sample(tiny, **settings):
    return masa.sample(tiny, *PROMPTS, **({"controls": masa.MasaCtrl(1)} | SETTINGS | settings))


CASES = {
    "control": (Mine, {"controls": Mine(2, mask=masa.WordMasks("cat", "dog", 0.3))}),
    "guidance": (Stronger, {"guidance": Stronger(1.5)}),
    "guidance within": (Stronger, {"guidance": masa.GuidanceInterval(1, 3, within=Stronger(1.5))}),
    "sampler": (Plain, {"sampler": Plain(20)}),
    "schedule": (Denser, {"schedule": Denser(share=0.7)}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_registered_runs_again(tiny, tmp_path, case):
    kind, settings = CASES[case]
    assert masa.register(kind) is kind
    first = sample(tiny, **settings)
    assert not torch.equal(first.latents, sample(tiny).latents)
    first.source.save(tmp_path / "source.png")
    again = masa.rerun(tmp_path / "source.png", tiny, progress=False)
    assert torch.equal(again.latents, first.latents)
    assert again.settings == first.settings


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_registered_runs_and_its_rerun_is_refused_by_name(tiny, tmp_path, case):
    kind, settings = CASES[case]
    first = sample(tiny, **settings)
    first.source.save(tmp_path / "source.png")
    with pytest.raises(masa.MasaError, match=f"'{kind.__name__}', which was not registered when they were written"):
        masa.rerun(tmp_path / "source.png", tiny, progress=False)
    masa.register(kind)  # too late: its fields are lost
    with pytest.raises(masa.MasaError, match=f"'{kind.__name__}'"):
        masa.rerun(tmp_path / "source.png", tiny, progress=False)


def test_what_was_registered_elsewhere_is_named(tiny, tmp_path):
    masa.register(Mine)
    sample(tiny, controls=Mine()).source.save(tmp_path / "source.png")
    del KINDS["Mine"]
    with pytest.raises(masa.MasaError, match=r"name a 'Mine', which this version .*--plugin FILE.py"):
        masa.rerun(tmp_path / "source.png", tiny, progress=False)


def test_values_come_back_whole():
    masa.register(Mine)
    for value in (Mine(3, (8, 9), masa.WordMasks("a", 2)), Mine()):
        assert restore(json.loads(json.dumps(describe(value)))) == value


def test_derived_fields_are_not_given_twice():
    @masa.register
    @dataclass(frozen=True)
    class Derived:
        start: int = 1
        end: int = field(init=False, default=5)

    assert restore(describe(Derived(3))) == Derived(3)


# --------------------------------------------------------------------------------- inversions, caches, older files


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_schedule_of_ones_own_holds_for_the_edit_too(tiny, picture, tmp_path):
    """Without registration the trajectory keeps it in memory, and is not saved as plain DDIM's."""
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    inverted = masa.invert(tiny, picture, schedule=Denser(), **settings)
    assert inverted.schedule == Denser()
    kept = {"target": "a dog", "controls": masa.MasaCtrl(1), "progress": False}
    out = masa.sample(tiny, trajectory=inverted, **kept)
    edited = masa.edit(tiny, picture, "a dog", schedule=Denser(), controls=masa.MasaCtrl(1), **settings)
    assert torch.equal(edited.latents, out.latents)
    with pytest.raises(masa.MasaError, match=r"schedule is or holds a Denser, .* masa.register"):
        inverted.save(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []
    masa.register(Denser)
    masa.invert(tiny, picture, schedule=Denser(), **settings).save(tmp_path / "t.safetensors")
    loaded = masa.Trajectory.load(tmp_path / "t.safetensors")
    assert loaded.schedule == Denser()
    assert torch.equal(masa.sample(tiny, trajectory=loaded, **kept).latents, out.latents)
    plain = masa.edit(tiny, picture, "a dog", controls=masa.MasaCtrl(1), **settings)
    assert not torch.equal(plain.latents, out.latents)


@pytest.mark.parametrize("case", ["guidance", "guidance within", "sampler", "schedule"])
def test_a_cache_keeps_what_is_registered_and_refuses_the_rest(tiny, tmp_path, case):
    kind, settings = CASES[case]
    with pytest.raises(masa.MasaError, match=f"{case.split()[0]} is or holds a {kind.__name__}, which"):
        masa.record(tiny, PROMPTS[0], controls=masa.MasaCtrl(1), **SETTINGS, **settings)
    masa.register(kind)
    cache = masa.record(tiny, PROMPTS[0], controls=masa.MasaCtrl(1), **SETTINGS, **settings)
    cache.save(tmp_path / "cache.safetensors")
    loaded = masa.SourceCache.load(tmp_path / "cache.safetensors", tiny)
    for kept in (cache, loaded):
        out = masa.sample(tiny, target=PROMPTS[1], cache=kept, controls=masa.MasaCtrl(1), progress=False)
        assert (out.latents - sample(tiny, **settings).latents).abs().max() < 1e-4


def test_older_pictures_run_again(tiny, tmp_path):
    """They name neither a sampler nor a guidance: they had DDIM and plain guidance."""
    first = sample(tiny)
    older = {name: value for name, value in first.settings.items() if name not in ("sampler", "guidance")}
    Picture.of(first.source, older).save(tmp_path / "source.png")
    again = masa.rerun(tmp_path / "source.png", tiny, progress=False)
    assert torch.equal(again.latents, first.latents)
    assert again.settings == first.settings
    assert again.settings["sampler"] == {"kind": "DDIM"}
    assert again.settings["guidance"] == {"kind": "ClassifierFree"}


def test_the_arguments_of_sample_are_the_settings():
    """One list of them serves the checks, the PNG, the rerun and the command line; here is what is no setting."""
    arguments = set(inspect.signature(masa.sample).parameters)
    beside = {"sd", "trajectory", "cache", "generator", "progress", "callback"}
    assert arguments - beside == {f.name for f in fields(RunSettings)} - {"generator_state"}


def test_settings_come_back_whole():
    """Each is another than its default, and is read back from its JSON."""
    noise = torch.randn(1, 4, 8, 8)
    asked = RunSettings(
        source="a", target=("b", "c"), controls=(masa.MasaCtrl(2),), pin_source=False, steps=9, skip_steps=1,
        guidance_scale=3.0, guidance=masa.RescaledGuidance(0.2), negative_prompt="d", height=64, width=128, seed=5,
        generator_state={"packed": "e"}, latents=noise, eta=0.5, schedule=masa.Schedule(offset=0),
        sampler=masa.DPMSolverPP(karras=True), targets_at_once=2, tiled=True, backend="sdpa",
    )  # fmt: skip
    back = RunSettings.restored(json.loads(json.dumps(asked.describe())))
    for f in fields(RunSettings):
        value, default = getattr(asked, f.name), getattr(RunSettings(), f.name)
        if f.name == "latents":
            assert torch.equal(back.latents, noise)
        else:
            assert getattr(back, f.name) == value != default, f.name


def test_older_caches_serve(tiny):
    """They may be asked for what they had without saying so."""
    cache = masa.record(tiny, PROMPTS[0], controls=masa.MasaCtrl(1), **SETTINGS)
    settings = {name: value for name, value in cache.settings.items() if name not in ("sampler", "guidance")}
    older = replace(cache, settings=settings, predictions=None)
    asked = {"target": PROMPTS[1], "cache": older, "controls": masa.MasaCtrl(1), "progress": False}
    out = masa.sample(tiny, sampler="ddim", guidance=masa.ClassifierFree(), **asked)
    assert torch.equal(out.latents, masa.sample(tiny, **(asked | {"cache": cache})).latents)
    with pytest.raises(masa.MasaError, match="sampler is DPMSolverPP"):
        masa.sample(tiny, sampler="dpm++2m", **asked)


# ---------------------------------------------------------------------------------------------------- what may be


def test_other_things_are_refused():
    @dataclass
    class Thawed:
        pass

    class NoDataclass:
        pass

    for thing, name in ((Thawed, "Thawed"), (NoDataclass, "NoDataclass"), (Mine(), r"Mine\(")):
        with pytest.raises(masa.MasaError, match=rf"register was given {name}.*; expected a class under @dataclass"):
            masa.register(thing)


def test_a_name_stands_for_one_class():
    @dataclass(frozen=True)
    class MasaCtrl:
        pass

    with pytest.raises(masa.MasaError, match=r"MasaCtrl is registered already, by masa\.controls\.masactrl"):
        masa.register(MasaCtrl)

    def cell():
        @masa.register
        @dataclass(frozen=True)
        class Again:
            start: int = 0

        return Again

    first, second = cell(), cell()  # as a notebook's cell that runs twice
    assert first is not second
    assert type(restore(describe(second()))) is second


# ------------------------------------------------------------------------------------------------------------ sweeps


def test_a_sweep_varies_a_registered_controls_fields(tiny):
    rows, columns = ("start_step", [0, 2]), ("layers", [(4, 5), (10,)])
    with pytest.raises(masa.MasaError, match=r"Mine is none; use masa\.register"):
        masa.sweep(tiny, *PROMPTS, rows, columns, control=Mine(), **SETTINGS)
    masa.register(Mine)
    sheet = masa.sweep(tiny, *PROMPTS, rows, columns, control=Mine(), **SETTINGS)
    assert sheet.settings["controls"] == [describe(Mine())]
    with pytest.raises(masa.MasaError, match="cannot vary 'union'; expected one of start_step, layers, mask, guidance"):
        masa.sweep(tiny, *PROMPTS, ("union", [True]), columns, control=Mine(), **SETTINGS)


# -------------------------------------------------------------------------------------------------- the command line

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass
import masa

@masa.register
@dataclass(frozen=True)
class FromFile:
    start_step: int = 1
    mask: object = None

    def begin(self, run):
        return masa.MasaCtrl(self.start_step, mask=self.mask).begin(run)

@masa.register
@dataclass(frozen=True)
class Half(masa.Guidance):
    def guide(self, uncond, cond, scale, step):
        return uncond + scale / 2 * (cond - uncond)

@masa.register
@dataclass(frozen=True)
class OnTheLowSide(masa.DPMSolverPP):
    """2M, its last prediction kept."""
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLUGIN)
    return tmp_path


def test_a_plugins_classes_are_arguments(home, tiny, tiny_folder):
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "--steps", "3", "--height", "64", "--width", "64", "-q"]
    argv = ["sample", *PROMPTS, *model, "--seed", "1", "--plugin", "mine.py", "--control", "FromFile", "-o", "out"]
    mask = '{"kind": "WordMasks", "source": "cat", "target": "dog", "threshold": 0.3}'
    argv += ["--set", "FromFile.start_step=2", "--set", f"FromFile.mask={mask}", "--sampler", "OnTheLowSide"]
    argv += ["--set", "OnTheLowSide.karras=true", "--guidance-rule", "Half", "--guidance-interval", "0", "2"]
    assert main(argv) == 0
    expected = masa.sample(
        tiny,
        *PROMPTS,
        controls=masa.MasaCtrl(2, mask=masa.WordMasks("cat", "dog", 0.3)),
        sampler=masa.DPMSolverPP(karras=True),
        guidance=masa.GuidanceInterval(0, 2, within=KINDS["Half"]()),
        **SETTINGS,
    )
    with Image.open("out/target_0.png") as picture:
        assert picture.tobytes() == expected.targets[0].tobytes()
    # A rerun needs the file too.
    for name in ("FromFile", "Half", "OnTheLowSide"):
        del KINDS[name]
    assert main(["rerun", "out/target_0.png", "-o", "lost", "-q"]) == 2
    assert main(["rerun", "out/target_0.png", "-o", "again", "-q", "--plugin", "mine.py"]) == 0
    assert Path("again/target_0.png").read_bytes() == Path("out/target_0.png").read_bytes()

    sweep = ["sweep", *PROMPTS, *model, "--plugin", "mine.py", "--control", "FromFile", "--rows", "start_step=0,2"]
    assert main([*sweep, "--columns", "guidance_scale=1,5", "-o", "s", "--seed", "1"]) == 0
    assert read_settings("s/sweep.png")["controls"] == [{"kind": "FromFile", "start_step": 1, "mask": None}]


def test_samplers_and_guidance_on_the_command_line(home, tiny, tiny_folder):
    model = ["-c", str(tiny_folder), "--dtype", "fp32", "--steps", "3", "--height", "64", "--width", "64", "-q"]
    argv = ["sample", *PROMPTS, *model, "--seed", "1", "--start-step", "1", "-o", "out", "--sampler", "dpm++2m"]
    assert main([*argv, "--guidance-rescale", "0.5", "--set", "DPMSolverPP.spacing=linspace"]) == 0
    written = read_settings("out/target_0.png")
    assert restore(written["sampler"]) == masa.DPMSolverPP(spacing="linspace")
    assert written["guidance"] == {"kind": "RescaledGuidance", "phi": 0.5}
    Image.new("RGB", (64, 64), "red").save("photo.png")
    sampled = ["--sampler", "dpm++2m", "--guidance-interval", "0", "2", *model]
    assert main(["edit", "photo.png", "a dog", "--no-control", "-o", "e", *sampled]) == 0
    assert main(["sdedit", "photo.png", "a dog", "-o", "d", "--seed", "1", *sampled]) == 0
    for name in ("e", "d"):
        written = read_settings(f"{name}/target_0.png")
        assert written["sampler"]["kind"] == "DPMSolverPP"
        assert written["guidance"]["end"] == 2


TWO = ["sample", *PROMPTS]
SWEEP = ["sweep", *PROMPTS, "--plugin", "mine.py"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TWO, "--plugin", "absent.py"], "--plugin absent.py is no Python file"),
        ([*TWO, "--plugin", "broken.py"], "--plugin broken.py failed: ZeroDivisionError"),
        ([*TWO, "--plugin", "idle.py"], "--plugin idle.py registers nothing"),
        ([*TWO, "--plugin"], "--plugin: expected one argument"),
        ([*TWO, "--control", "FromFile"], "'FromFile' is not a list of masactrl"),
        ([*TWO, "--sampler", "heun"], "'heun' is no sampler; expected one of ddim"),
        ([*TWO, "--guidance-rule", "ddim"], "'ddim' is no guidance; expected one of ClassifierFree"),
        ([*TWO, "--guidance-rule", "GuidanceInterval"], "GuidanceInterval cannot be made: .* give its fields as --set"),
        ([*TWO, "--guidance-rule", "ClassifierFree", "--guidance-rescale", "0.5"], "leave one out"),
        ([*TWO, "--guidance-rescale", "1.5"], r"phi is 1\.5"),
        ([*TWO, "--sampler", "dpm++2m", "--eta", "0.5"], r"--eta 0\.5 would do nothing: it is DDIM's"),
        ([*TWO, "--guidance-interval", "3", "3"], "holds no step"),
        ([*TWO, "--set", "MasaCtrl"], "is not CLASS.FIELD=VALUE"),
        ([*TWO, "--set", "MasaCtrl.size=3"], "MasaCtrl has start_step, start_layer"),
        (
            [*TWO, "--set", "DPMSolverPP.karras=true"],
            "karras=true: no DPMSolverPP is in use, but DDIM, MasaCtrl",
        ),
        (
            [*TWO, "--guidance", "1", "--guidance-rescale", "0.5"],
            r"-rescale 0\.5 would do nothing: --guidance 1",
        ),
        ([*TWO, "--guidance", "1", "--guidance-interval", "0", "3"], "--guidance-interval 0,3 would do nothing"),
        (
            [*TWO, "--guidance", "1", "--guidance-rule", "ClassifierFree"],
            "-rule ClassifierFree would do nothing",
        ),
        (["sdedit", "a.png", "a dog", "--guidance", "1", "--guidance-rescale", "0.5"], "would do nothing"),
        ([*SWEEP, "--control", "Half"], "'Half' is no control"),
        ([*SWEEP, "--control", "FromFile", "--start-step", "1"], "--start-step 1 would do nothing: .* use --set"),
        ([*SWEEP, "--control", "FromFile", "--rows", "union=True"], "a sweep of FromFile cannot vary 'union'"),
        ([*SWEEP, "--set", "FromFile.start_step=1"], "no FromFile is in use, but MasaCtrl"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(home, capsys, monkeypatch, argv, message):
    Path("broken.py").write_text("1 / 0")
    Path("idle.py").write_text("import masa")
    Image.new("RGB", (64, 64)).save("a.png")
    monkeypatch.setattr("masa.load", lambda *args, **settings: pytest.fail("loaded first"))
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_values_of_set_are_json_or_text():
    assert parse_field("A.b=3") == ("A", "b", 3)
    assert parse_field("A.b=[1, 2]") == ("A", "b", (1, 2))
    assert parse_field("A.b=cat=dog") == ("A", "b", "cat=dog")
    assert parse_field('A.b={"cat": 2}') == ("A", "b", {"cat": 2})
    assert build_parser().parse_args([*TWO, "--set", "A.b=null"]).set == [("A", "b", None)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("false", False), ("None", None), ("3", 3), ("0.5", 0.5), ("cat", "cat"), ("[1, 2]", (1, 2))],
)
def test_a_field_is_read_as_json_or_as_python_writes_it(text, value):
    assert parse_field(f"Mine.field={text}") == ("Mine", "field", value)


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("high", 0.0, "expected a number such as 0.0"),
        ("no", True, "expected true or false"),
        (1, True, "true or false"),
    ],
)
def test_a_field_of_another_kind_is_named(value, default, expected):
    from masa.cli.registered_arguments import check_kind

    with pytest.raises(masa.MasaError, match=f"--set Mine.x is {value!r}; .*{expected}"):
        check_kind("--set Mine.x", value, default)


def test_a_subclass_of_a_built_in_control_is_not_taken_for_it(tiny):
    """Its own fields would be lost, and the rerun be another picture without a word."""

    @dataclass(frozen=True, eq=False)
    class Softer(masa.BlendedLatents):
        softness: int = 3

    described = masa.settings.describe(Softer(torch.ones(8, 8)))
    assert described == {"kind": "Softer", "own": True}


def test_a_control_of_a_users_that_names_a_file_is_found_again(tiny, tmp_path, monkeypatch):
    """What settings keep of it, and where a rerun looks for its file, are its own affair, by one class to extend."""

    @masa.register
    @dataclass(frozen=True)
    class Tuned(FileControl):
        path: str
        start: int | None = None

        def kept(self):
            return replace(self, start=int(Path(self.path).read_text()))

        def begin(self, run):
            return masa.MasaCtrl(self.start or int(Path(self.path).read_text()), 0).begin(run)

    monkeypatch.setitem(KINDS, "Tuned", Tuned)
    monkeypatch.chdir(tmp_path)
    Path("start.txt").write_text("1")
    run = {"steps": 3, "height": 64, "width": 64, "seed": 3, "progress": False}
    out = masa.sample(tiny, "a cat", "a dog", controls=Tuned("start.txt"), **run)
    assert out.settings["controls"] == [{"kind": "Tuned", "path": "start.txt", "start": 1}]
    (tmp_path / "moved").mkdir()
    out.targets[0].save(tmp_path / "moved" / "target.png")
    Path("start.txt").rename("moved/start.txt")  # beside the picture
    assert torch.equal(masa.rerun("moved/target.png", tiny, progress=False).latents, out.latents)
    Path("moved/start.txt").unlink()
    with pytest.raises(masa.MasaError, match=r"start.txt, which moved/target.png was made with, is not there any more"):
        masa.rerun("moved/target.png", tiny, progress=False)
