"""The demo model's adapter of stick figures: its training, its file, the shipped one, and `masa demo --pose`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import masa
from masa.cli.commands import main
from masa.runtime.adapters import DEMO_ADAPTER, locate_adapter, read_adapter
from masa.weights.demo import train_adapter
from masa.weights.demo.loop import Budget
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.train_adapter import AdapterRecipe, Pool
from masa.weights.demo.world import POSES, SUBJECTS, Between, caption, render, sample
from masa.workflows import demo_pose
from masa.workflows.demo import SHOWN_SIZE

CPU = torch.device("cpu")
# One rate throughout, so that a run in two parts takes the steps of a whole one.
RECIPE = AdapterRecipe(batch=2, warmup=1, floor=1.0)


@pytest.fixture(scope="module")
def pool(tiny):
    return train_adapter.make_pool(tiny, range(train_adapter.FIRST_SEED, train_adapter.FIRST_SEED + 6), SUBJECTS)


@pytest.fixture(scope="module")
def sd():
    """The demo model in float32."""
    loaded = masa.load(dtype="fp32", device="cpu")
    loaded.unet.requires_grad_(False)
    return loaded


# ------------------------------------------------------------------------------------------------------------ training


def test_examples_are_of_all_poses_and_captions_leave_them_out():
    some = [train_adapter.example(seed, SUBJECTS) for seed in range(400)]
    assert some[:20] == [train_adapter.example(seed, SUBJECTS) for seed in range(20)]
    unnamed = [e for e in some if isinstance(e.pose, Between)]
    assert 0.2 < len(unnamed) / len(some) < 0.4  # 40% of all but birds
    assert {e.appearance.subject for e in unnamed} == {"cat", "dog", "person"}
    for e in unnamed:
        assert not any(pose in e.caption for pose in POSES[e.appearance.subject])
    named = [e for e in some if not isinstance(e.pose, Between)]
    assert 0.35 < sum(e.pose in e.caption for e in named) / len(named) < 0.55
    assert 0.35 < sum("facing" not in e.caption for e in some) / len(some) < 0.75
    assert len({e.thickness for e in some}) > 100
    assert all(isinstance(train_adapter.example(seed, ["cat"], between=0.0).pose, str) for seed in range(50))


def test_a_pool_holds_each_example(tiny, pool):
    size = tiny.config.image_size
    assert pool.sticks.shape == (6, 1, size, size)
    assert pool.latents.shape == (6, 4, size // 8, size // 8)
    one = train_adapter.example(train_adapter.FIRST_SEED + 5, SUBJECTS)
    stick = stick_figure(one.appearance.subject, one.pose, one.scene, size, one.thickness)
    assert np.array_equal(pool.sticks[5, 0], stick)
    assert pool.ids[5].tolist() == tiny.tokenizer([one.caption])[0].tolist()
    picture = render(one.appearance, one.pose, one.scene, size)[0]
    # Half precision, and a batch of six.
    assert torch.allclose(pool.latents[5].float(), tiny.encode_image(picture)[0], atol=2e-2)


def test_training_goes_on_where_it_stopped(tiny, pool, tmp_path):
    def train(samples, name):
        return train_adapter.train_adapter(tiny, pool, RECIPE, Budget(samples=samples), tmp_path / name, threads=1)

    whole, progress = train(8, "whole.pt")
    assert (progress.steps, progress.samples) == (4, 8)
    train(4, "parts.pt")
    torch.manual_seed(99)  # whatever the second process's global state is
    resumed, _ = train(8, "parts.pt")
    fresh = train_adapter.build(tiny)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert not torch.equal(value, fresh.state_dict()[name])
    other = replace(tiny, vae=masa.load(dtype="fp32").vae)
    with pytest.raises(ValueError, match=r"parts.pt is of an adapter for another model; give another --run"):
        train_adapter.train_adapter(other, pool, RECIPE, Budget(samples=8), tmp_path / "parts.pt")


def test_the_model_stays_as_it_is(tiny, pool, tmp_path):
    before = tiny.fingerprint
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    train_adapter.train_adapter(tiny, pool, RECIPE, Budget(samples=2), tmp_path / "a.pt", threads=1)
    assert tiny.fingerprint == before
    assert torch.equal(torch.rand(1), first)  # and so does the caller's random state


def test_each_setting_of_the_recipe_matters(tiny, pool, tmp_path):
    def train(seed=0, **changes):
        path = tmp_path / f"{seed}{changes}.pt"
        network, _ = train_adapter.train_adapter(
            tiny, pool, replace(RECIPE, **changes), Budget(samples=12), path, seed=seed, threads=1
        )
        return torch.cat([p.flatten() for p in network.parameters()])

    usual = train()
    for changes in (
        *({"batch": 4}, {"peak_rate": 1e-4}, {"empty_captions": 1.0}),
        *({"decay": 0.1}, {"warmup": 50}, {"floor": 0.0}, {"seed": 1}),
    ):
        assert not torch.equal(train(**changes), usual), changes


def test_the_file_is_an_ordinary_adapters(tiny, tmp_path):
    """In the layout of the first adapters, half precision, read by the class that reads those."""
    torch.manual_seed(0)
    network = train_adapter.build(tiny)
    train_adapter.export_adapter(tmp_path, network, {"samples": 3})
    path = tmp_path / train_adapter.FILE
    state = load_file(path)
    assert {t.dtype for t in state.values()} == {torch.float16}
    blocks = {f"body.{b}.block{k}.{kind}" for b in range(8) for k in (1, 2) for kind in ("weight", "bias")}
    assert blocks | {"conv_in.weight", "conv_in.bias", "body.2.in_conv.weight", "body.2.in_conv.bias"} == set(state)
    again = read_adapter(path, tiny.config.unet, torch.float32, CPU)
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
    assert json.loads((tmp_path / train_adapter.CARD).read_text()) == {"samples": 3}
    stick = stick_figure("cat", "lying", sample(0, ["cat"]).scene)
    steered = masa.T2IAdapter(path, source=stick)
    plain, shown = (
        masa.sample(tiny, "a cat", controls=c, steps=2, seed=0, progress=False).latents for c in ([], steered)
    )
    assert (plain - shown).abs().max() > 1e-3


def test_one_command_trains_writes_and_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    argv = ["train_adapter", "--model", str(tiny_folder), "--run", str(tmp_path / "run"), "--pictures", "4"]
    argv += ["--batch", "2", "--threads", "1", "--subjects", "cat,bird"]
    monkeypatch.setattr(train_adapter, "HELD_OUT", range(4))

    def call(*more):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        train_adapter.main()
        return json.loads((tmp_path / "run" / "adapter" / train_adapter.CARD).read_text())

    first = call("--minutes", "0.0001")
    assert first["steps"] == 1  # a step takes longer than that
    assert first["subjects"] == ["cat", "bird"]
    assert set(first["noise_error"]) == {"none", "own", "another's"}
    made = (tmp_path / "run" / "pool.pt").stat().st_mtime_ns
    second = call("--minutes", str(first["minutes"] + 0.03))
    assert second["steps"] > 1
    assert (tmp_path / "run" / "pool.pt").stat().st_mtime_ns == made
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("--subjects", "cow")
    assert "unknown subjects ['cow']; there are cat, dog" in capsys.readouterr().err


def test_a_model_says_which_subjects_it_knows(tmp_path):
    assert train_adapter.known_subjects(tmp_path) == SUBJECTS
    (tmp_path / "facts.json").write_text('{"subjects": ["cat"]}')
    assert train_adapter.known_subjects(tmp_path) == ("cat",)


# ---------------------------------------------------------------------------------------------------- the shipped one


def test_the_shipped_adapter_is_the_shipped_models():
    """When this fails the demo model has changed; its adapter is trained anew by one command, which its card names."""
    facts = json.loads((DEMO_ADAPTER.parent / train_adapter.CARD).read_text())
    model = masa.load(dtype="fp32", device="cpu")
    assert facts["model"] == model.fingerprint
    assert facts["subjects"] == json.loads((masa.pipeline.DEMO / "facts.json").read_text())["subjects"]
    assert DEMO_ADAPTER.stat().st_size < 8e6


def test_the_right_stick_beats_a_wrong_one_and_none(sd):
    """At the noisiest half of the timesteps, on individuals and poses that no training saw."""
    network = read_adapter(DEMO_ADAPTER, sd.config.unet, torch.float32, CPU)
    known = train_adapter.known_subjects(masa.pipeline.DEMO)
    held_out = train_adapter.make_pool(sd, range(40_000, 40_016), known)
    error = train_adapter.judge(sd, network, held_out)
    # 16 examples: as trained, about 0.025, 0.032 and 0.055.
    assert error["own"] < 0.9 * error["none"]
    assert error["none"] < 0.9 * error["another's"]


def pool_of(sd, poses, seeds):
    """Held-out cats, one pose each, drawn ordinarily and captioned without it."""
    size, drawn = sd.config.image_size, [sample(seed, ["cat"]) for seed in seeds]
    pictures = [render(d.appearance, pose, d.scene, size)[0] for d, pose in zip(drawn, poses, strict=True)]
    sticks = [stick_figure("cat", pose, d.scene, size) for d, pose in zip(drawn, poses, strict=True)]
    latents = torch.cat([sd.encode_image(picture) for picture in pictures])
    captions = [caption(d.appearance, None, d.scene, facing=False) for d in drawn]
    return Pool(latents, torch.from_numpy(np.stack(sticks))[:, None], sd.tokenizer(captions))


def test_poses_that_no_prompt_names_are_followed_too(sd):
    network = read_adapter(DEMO_ADAPTER, sd.config.unet, torch.float32, CPU)
    poses = [Between("sitting", "jumping", 0.5), Between("standing", "lying", 0.5)] * 5
    error = train_adapter.judge(sd, network, pool_of(sd, poses, range(41_000, 41_010)))
    assert error["own"] < 0.9 * min(error["none"], error["another's"])


def test_demo_is_a_path_and_a_run_with_it_is_repeated(tmp_path, monkeypatch, capsys):
    """The settings name no place on this machine, and hold the file's digest."""
    monkeypatch.chdir(tmp_path)
    stick = stick_figure("cat", "lying", sample(0, ["cat"]).scene)
    Image.fromarray(stick).save("pose.png")
    usual = ["--steps", "2", "--guidance", "4", "--seed", "0", "--start-step", "0", "-q"]
    assert main(["sample", "a cat", "a cat", "--t2i-adapter", "demo", "pose.png", *usual, "-o", "out"]) == 0
    assert main(["sample", "a cat", "a cat", *usual, "-o", "plain"]) == 0
    shown, plain = (np.asarray(Image.open(f"{folder}/target_0.png")).astype(int) for folder in ("out", "plain"))
    assert np.abs(shown - plain).mean() > 1
    monkeypatch.chdir("/")
    again = masa.rerun(tmp_path / "out" / "target_0.png", progress=False)
    assert np.array_equal(np.asarray(again.targets[0]), shown)
    adapter = next(c for c in again.settings["controls"] if c["kind"] == "T2IAdapter")
    assert adapter["path"] == "demo"
    assert adapter["sha256"] == masa.T2IAdapter(DEMO_ADAPTER, target=stick).file.digest()


def test_demo_means_what_ships_and_a_folder_of_that_name_is_dot_slash_demo(tmp_path, monkeypatch):
    """`masa demo -o demo` makes such a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert locate_adapter("demo") == DEMO_ADAPTER
    assert locate_adapter("./demo") == Path("demo")
    assert masa.load("demo").fingerprint == masa.load().fingerprint
    with pytest.raises(masa.MasaError, match="demo"):
        masa.load("./demo")


# ----------------------------------------------------------------------------------------------------- masa demo --pose


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Two steps, in a folder of its own."""
    monkeypatch.setattr(demo_pose, "STEPS", 2)
    monkeypatch.setattr(demo_pose, "CONTROL", masa.MasaCtrl(1, 6))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_pose_writes_source_drawings_edits_and_truths(quick, capsys):
    assert main(["demo", "--pose", "-q", "-o", "out"]) == 0
    printed = capsys.readouterr().out
    names = ["pose.png", "picture.png", "drawn_0.png", "drawn_1.png"]
    assert sorted(path.name for path in (quick / "out").iterdir()) == sorted(names)
    assert all(str(Path("out") / name) in printed for name in names)
    sheet = Image.open(quick / "out" / "pose.png")
    assert sheet.width == 4 * SHOWN_SIZE + 12
    assert sheet.height > 2 * SHOWN_SIZE
    who = demo_pose.find_sample(10 * demo_pose.SEED)
    for name, pose in zip(names[2:], demo_pose.POSES, strict=True):
        assert np.array_equal(Image.open(quick / "out" / name), stick_figure("cat", pose, who.scene))
    # The named pose is in its prompt, the other in none; a rerun finds all.
    again = masa.rerun(quick / "out" / "pose.png", progress=False)
    assert len(again.targets) == 2
    assert "standing" in again.labels[1]
    assert not any(pose in again.labels[2] for pose in POSES["cat"])
    assert main(["demo", "--pose", "-q", "-o", "out"]) == 2
    assert "already holds pose.png" in capsys.readouterr().err


def test_demo_pose_takes_a_drawing(quick, capsys, monkeypatch):
    drawing = Image.fromarray(stick_figure("cat", "lying", sample(3, ["cat"]).scene, 256))
    drawing.save("mine.png")
    assert main(["demo", "--pose", "mine.png", "--seed", "1", "-q", "-o", "out"]) == 0
    assert sorted(path.name for path in (quick / "out").iterdir()) == ["picture.png", "pose.png"]
    assert Image.open(quick / "out" / "pose.png").width == 3 * SHOWN_SIZE + 8
    settings = masa.rerun(quick / "out" / "pose.png", progress=False).settings
    assert len(settings["target"]) == 1
    assert not any(word in settings["target"][0] for word in ("facing", *POSES["cat"]))
    capsys.readouterr()
    monkeypatch.setattr(demo_pose, "load", lambda: pytest.fail("loaded first"))
    assert main(["demo", "--pose", "absent.png", "-q"]) == 2
    assert "absent.png" in capsys.readouterr().err
