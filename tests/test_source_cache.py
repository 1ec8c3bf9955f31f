"""A recorded source: targets that read it equal those that run beside it, bit for bit, and cost only their own rows."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rounding import products_are_rowwise, same

import masa
from masa.attention import Call, attend
from masa.cache.storage import choose_store
from masa.controls.base import ActiveControl
from masa.edits import CachedRows, Edit, Part, Record, Site
from masa.kernels.mutual_attention import MaskPlan

SOURCE, TARGETS = "a photo of a sitting cat", ["a photo of a running cat", "a red cat in the snow", "a cat on a mat"]
STEPS = 5
SETTINGS = {"steps": STEPS, "height": 128, "width": 128, "progress": False}


def masks() -> masa.GivenMasks:
    source, target = torch.zeros(40, 60), torch.zeros(33, 47)
    source[5:30, 10:50] = 1.0
    target[10:, 5:30] = 0.7
    return masa.GivenMasks(source, [target, 1 - target, target > 0])


CONTROLS = {
    "plain": masa.MasaCtrl(2, 10),
    "lists": masa.MasaCtrl(steps=[1, 4], layers=[4, 9, 14]),
    "union": masa.MasaCtrl(2, 8, union=True, source_weight=2.0),
    "given masks": masa.MasaCtrl(2, 8, mask=masks()),
    "word masks": masa.MasaCtrl(2, 10, mask=masa.WordMasks("sitting cat", "cat", threshold=0.4)),
    "word masks, early layer": masa.MasaCtrl(2, 4, mask=masa.WordMasks("cat", "cat", threshold=0.4)),
    "masked union": masa.MasaCtrl(1, 8, mask=masa.WordMasks("cat", "cat", threshold=0.4), union=True),
    "style": masa.StyleTransfer(2, 8),
    "local blend": [masa.MasaCtrl(2, 10), masa.LocalBlend("cat", "cat")],
    "none": [],
}


@pytest.fixture(scope="module")
def trajectory(tiny):
    picture = torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return masa.invert(tiny, picture, SOURCE, **SETTINGS)


@pytest.fixture(scope="module")
def caches(tiny, trajectory):
    controls = [masa.MasaCtrl(1, 4), masa.StyleTransfer(2, 8)]
    made = {
        "synthesis": masa.record(tiny, SOURCE, controls=controls, seed=3, **SETTINGS),
        "pinned": masa.record(tiny, controls=controls, trajectory=trajectory, progress=False),
        "free": masa.record(tiny, controls=controls, trajectory=trajectory, pin_source=False, progress=False),
    }
    starts = {
        "synthesis": {"source": SOURCE, "seed": 3, **SETTINGS},
        "pinned": {"trajectory": trajectory, "progress": False},
        "free": {"trajectory": trajectory, "pin_source": False, "progress": False},
    }
    return {name: (made[name], starts[name]) for name in made}


def compare(cached: masa.Result, plain: masa.Result) -> None:
    same(cached.latents, plain.latents)
    assert cached.settings == plain.settings
    assert set(cached.masks) == set(plain.masks)
    for control, by_step in plain.masks.items():
        assert set(cached.masks[control]) == set(by_step)
        for step, mask in by_step.items():
            assert (cached.masks[control][step] != mask).float().mean() <= (0.0 if products_are_rowwise() else 0.01)


# -------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("control", CONTROLS)
def test_cached_equals_uncached(tiny, caches, control):
    cache, start = caches["synthesis"]
    plain = masa.sample(tiny, target=TARGETS, controls=CONTROLS[control], **start)
    cached = masa.sample(tiny, target=TARGETS, controls=CONTROLS[control], cache=cache, progress=False)
    compare(cached, plain)
    same(cached.latents[:1], plain.latents[:1])


@pytest.mark.parametrize(
    "control",
    [
        masa.PromptToPrompt("refine", reweight={"snow": 3.0}, local_blend=masa.LocalBlend("cat", "cat", start=0.4)),
        masa.PromptToPrompt(None, reweight={"cat": 2.0}, cross_replace_steps={"default": 0.2, "cat": 0.9}),
        masa.PlugAndPlay(),
    ],
    ids=["refine", "words of their own", "Plug-and-Play"],
)
def test_what_a_control_reads_is_recorded_before_its_targets_are_known(tiny, control):
    settings = SETTINGS | {"controls": control, "seed": 3}
    cache = masa.record(tiny, SOURCE, **settings)
    plain = masa.sample(tiny, SOURCE, TARGETS[:2], **settings)
    compare(masa.sample(tiny, target=TARGETS[:2], controls=control, cache=cache, progress=False), plain)


@pytest.mark.parametrize("source", ["pinned", "free"])
@pytest.mark.parametrize("control", ["plain", "word masks", "local blend"])
def test_a_cached_picture_is_edited_the_same(tiny, caches, source, control):
    cache, start = caches[source]
    plain = masa.sample(tiny, target=TARGETS[:1], controls=CONTROLS[control], **start)
    cached = masa.sample(tiny, target=TARGETS[:1], controls=CONTROLS[control], cache=cache, progress=False)
    compare(cached, plain)


@pytest.mark.slow
def test_only_rounding_is_between_them(tiny):
    """With UNet and VAE in float64 the latents agree to float32's last places: the arithmetic is the same."""
    parts = {name: copy.deepcopy(getattr(tiny, name)) for name in ("unet", "vae", "text_encoder")}
    wide = replace(tiny, **parts | {name: parts[name].double() for name in ("unet", "vae")})
    # Not in float64 itself: transformers 4 makes its mask in float32, which has no room for float64's least number.
    wide.text_encoder.register_forward_hook(lambda _module, _given, context: context.double())
    control = masa.MasaCtrl(1, 4, mask=masa.WordMasks("cat", "cat", threshold=0.4), union=True)
    cache = masa.record(wide, SOURCE, controls=control, seed=3, **SETTINGS)
    plain = masa.sample(wide, SOURCE, TARGETS[:2], controls=control, seed=3, **SETTINGS)
    cached = masa.sample(wide, target=TARGETS[:2], controls=control, cache=cache, progress=False)
    assert (cached.latents - plain.latents).abs().max() < 3e-6 * plain.latents.std()


@pytest.mark.parametrize(
    "controls",
    [
        CONTROLS["given masks"],
        CONTROLS["word masks, early layer"],
        masa.PromptToPrompt("refine", reweight={"snow": 3.0}, local_blend=masa.LocalBlend("cat", "cat", start=0.4)),
        masa.PlugAndPlay(),
        [masa.MasaCtrl(2, 10), masa.RecordAttention()],
        [],
    ],
    ids=["given masks", "word masks", "Prompt-to-Prompt", "Plug-and-Play", "recorded", "none"],
)
def test_targets_in_parts_equal_targets_together(tiny, controls):
    settings = SETTINGS | {"seed": 2, "eta": 0.3, "controls": controls}
    together = masa.sample(tiny, SOURCE, TARGETS, **settings)
    parts = masa.sample(tiny, SOURCE, TARGETS, targets_at_once=2, **settings)
    same(parts.latents, together.latents)
    for control, by_name in together.attention.items():
        for name, maps in by_name.items():
            same(parts.attention[control][name], maps)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_cached_source_serves_parts(tiny, guidance_scale):
    settings = SETTINGS | {"seed": 2, "eta": 0.3, "guidance_scale": guidance_scale}
    control = masa.MasaCtrl(1, 4, mask=masa.WordMasks("cat", "cat", threshold=0.4))
    cache = masa.record(tiny, SOURCE, controls=control, **settings)
    together = masa.sample(tiny, SOURCE, TARGETS, controls=control, **settings)
    parts = masa.sample(tiny, target=TARGETS, controls=control, cache=cache, targets_at_once=2, progress=False)
    same(parts.latents, together.latents)


@pytest.mark.parametrize("start", ["latents", "pinned", "free"])
def test_a_cache_recorded_from_a_later_step_serves(tiny, trajectory, generator, start):
    """What it holds is counted from the first step that was run."""
    if start == "latents":
        run = {"source": SOURCE, "latents": torch.randn(1, 4, 16, 16, generator=generator), **SETTINGS}
    else:
        run = {"trajectory": trajectory, "pin_source": start == "pinned", "progress": False}
    run |= {"skip_steps": 2, "controls": masa.MasaCtrl(3, 10)}
    cache = masa.record(tiny, **run)
    assert len(cache.latents) == STEPS - 2 + 1
    cached = masa.sample(tiny, target=TARGETS[0], cache=cache, controls=run["controls"], progress=False)
    compare(cached, masa.sample(tiny, target=TARGETS[0], **run))
    if start == "pinned":  # and a run may start later still
        later = masa.sample(tiny, target=TARGETS[0], **(run | {"skip_steps": 3}))
        cached = masa.sample(
            tiny, target=TARGETS[0], cache=cache, controls=run["controls"], skip_steps=3, progress=False
        )
        compare(cached, later)


def test_the_seed_of_an_edit_s_noise_is_the_recorded_one(tiny, trajectory):
    run = {"trajectory": trajectory, "pin_source": False, "eta": 0.6, "seed": 5, "controls": masa.MasaCtrl(2, 10)}
    cache = masa.record(tiny, progress=False, **run)
    use = {"target": TARGETS[0], "cache": cache, "controls": run["controls"], "progress": False}
    compare(masa.sample(tiny, **use), masa.sample(tiny, target=TARGETS[0], progress=False, **run))
    with pytest.raises(masa.MasaError, match="seed is 6, but the cache was recorded with 5"):
        masa.sample(tiny, seed=6, **use)
    with pytest.raises(masa.MasaError, match="generator and cache"):
        masa.sample(tiny, generator=torch.Generator(), **use)


def test_noise_that_a_trajectory_brings_is_kept(tiny, tmp_path):
    """It serves from the file as from memory, and asks for no seed: another may be given for what targets draw."""
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trajectory = masa.invert(tiny, picture, SOURCE, method="edit-friendly", seed=2, **SETTINGS)
    control = masa.MasaCtrl(2, 10)
    cache = masa.record(tiny, controls=control, trajectory=trajectory, progress=False)
    cache.save(tmp_path / "cache.safetensors")
    plain = masa.sample(tiny, target=TARGETS[0], controls=control, trajectory=trajectory, progress=False)
    for kept in (cache, masa.SourceCache.load(tmp_path / "cache.safetensors", tiny)):
        use = {"target": TARGETS[0], "cache": kept, "controls": control, "progress": False}
        compare(masa.sample(tiny, **use), plain)
        assert torch.equal(kept.trajectory.noise, trajectory.noise)
        masa.sample(tiny, seed=9, **use)


def test_targets_may_start_from_latents_of_their_own(tiny, generator):
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    control = masa.MasaCtrl(2, 10)
    cache = masa.record(tiny, SOURCE, controls=control, latents=noise[:1], **SETTINGS)
    use = {"target": TARGETS[0], "controls": control, "cache": cache, "progress": False}
    plain = masa.sample(tiny, SOURCE, TARGETS[0], controls=control, latents=noise, **SETTINGS)
    same(masa.sample(tiny, latents=noise, **use).latents, plain.latents)
    other = noise.clone()
    other[0, 0, 0, 0] += 1e-3
    with pytest.raises(masa.MasaError, match="not what the cache was recorded from"):
        masa.sample(tiny, latents=other, **use)


def test_recorded_maps_have_the_cached_source(tiny, caches):
    cache, start = caches["synthesis"]
    controls = [masa.MasaCtrl(2, 10), masa.RecordAttention(words=["cat"])]
    plain = masa.sample(tiny, target=TARGETS, controls=controls, **start)
    cached = masa.sample(tiny, target=TARGETS, controls=controls, cache=cache, progress=False)
    same(cached.attention[1]["cat"], plain.attention[1]["cat"])


def test_blended_latents_keep_a_cached_picture(tiny, caches):
    """It starts later than the cache was recorded, which a pinned source allows."""
    cache, start = caches["pinned"]
    mask = torch.zeros(8, 8)
    mask[:, 3:] = 1.0
    controls = [masa.MasaCtrl(2, 10), masa.BlendedLatents(mask)]
    plain = masa.sample(tiny, target=TARGETS, controls=controls, seed=4, **start)
    compare(masa.sample(tiny, target=TARGETS, controls=controls, seed=4, cache=cache, progress=False), plain)


def test_cached_keys_are_read_as_the_batch_s_own():
    """The same call with the source's rows in the batch and cached: bitwise equal."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 24, 8, generator=generator) for _ in range(3))  # u_s, u_t, c_s, c_t
    site = Site(0, 0, "attn1", "up", "self", 4, 2)
    cached = CachedRows(q=q[::2], k=k[::2], v=v[::2])
    region = torch.rand(4, 24, generator=generator) > 0.5
    for union in (False, True):
        for masked in (False, True):
            inside, outside = (
                Edit(parts=(Part(source, weight=2.0), Part(own))) if union else Edit(k_from=source, v_from=source)
                for source, own in (((0, 0, 2, 2), (-1, 1, -1, 3)), ((2, 3), (0, 1)))
            )
            outside = replace(outside, cached=cached)
            if masked:
                keys = region if union else region[::2]
                whole = torch.tensor([True, False, True, False])
                plan, plan_cached = MaskPlan.build(keys, region, whole), MaskPlan.build(region[::2], region[1::2])
                inside = replace(inside, mask=lambda tape, grid, plan=plan: plan)
                outside = replace(outside, mask=lambda tape, grid, plan=plan_cached: plan)
            read = inside.read_rows(4)[1]
            ref = attend(q, k[list(read)], v[list(read)], 4, site, (4, 6), Call({0: inside}, {}))
            own = slice(1, None, 2) if union else slice(0, 0)
            out = attend(q[1::2], k[own], v[own], 2, site, (4, 6), Call({0: outside}, {}))
            assert torch.equal(out, ref[1::2]), (union, masked)
    style = Edit(q_from=(2, 3), k_from=(2, 3), cached=cached)
    out = attend(q[:0], k[:0], v[1::2], 2, site, (4, 6), Call({0: style}, {}))
    ref = torch.nn.functional.scaled_dot_product_attention(q[::2], k[::2], v[1::2])
    assert torch.allclose(out, ref, atol=1e-6)


def test_cached_maps_stand_behind_those_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 2, 24, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    weights, maps = torch.rand(3, 2, 5, generator=generator), torch.rand(1, 5, 24, generator=generator)
    site = Site(1, 0, "attn2", "up", "cross", 4, 2)
    call = Call({1: Edit(records=(Record("key", weights),), cached=CachedRows(maps=maps))}, {})
    attend(q, k, v, 2, site, (4, 6), call)
    probabilities = (q @ k.mT / 8**0.5).softmax(-1).mean(1)
    assert torch.allclose(call.tape["key", 1][:2], weights[:2] @ probabilities.mT, atol=1e-5)
    assert torch.equal(call.tape["key", 1][2:], weights[2:] @ maps)


# ------------------------------------------------------------------------------------------------------ cost


def rows_of(unet: torch.nn.Module, run) -> list[int]:
    """How many rows each call of the UNet had."""
    counts: list[int] = []
    handle = unet.register_forward_pre_hook(lambda module, args: counts.append(len(args[2])))
    try:
        run()
    finally:
        handle.remove()
    return counts


@pytest.mark.slow
def test_a_further_target_costs_its_own_rows(tiny, trajectory):
    settings = {"steps": 50, "height": 64, "width": 64, "progress": False}
    made = {}
    assert rows_of(tiny.unet, lambda: made.update(cache=masa.record(tiny, SOURCE, **settings))) == [2] * 50
    count = rows_of(tiny.unet, lambda: masa.sample(tiny, target=TARGETS[0], cache=made["cache"], progress=False))
    assert count == [2] * 50  # 100; without the cache 200
    # In parts, a pinned source without words to look for: only with the targets that read it.
    control = masa.MasaCtrl(3, 10)
    count = rows_of(
        tiny.unet,
        lambda: masa.sample(
            tiny, target=TARGETS, controls=control, trajectory=trajectory, targets_at_once=2, progress=False
        ),
    )
    assert count == [4, 2] * 3 + [6, 4] * 2
    cache = masa.record(tiny, controls=control, trajectory=trajectory, progress=False)
    count = rows_of(
        tiny.unet,
        lambda: masa.sample(tiny, target=TARGETS, controls=control, cache=cache, targets_at_once=2, progress=False),
    )
    assert count == [4, 2] * 5


# --------------------------------------------------------------------------------------------------- storage


@pytest.fixture(scope="module")
def small(tiny):
    """Arguments of record, and the result that its caches must give."""
    settings = {"steps": 3, "height": 64, "width": 128, "seed": 1, "progress": False}
    control = masa.MasaCtrl(1, 10, mask=masa.WordMasks("cat", "cat"))
    cache = masa.record(tiny, SOURCE, controls=control, **settings)
    use = {"target": TARGETS[0], "controls": control, "progress": False}
    return cache, settings | {"source": SOURCE, "controls": control}, use, masa.sample(tiny, cache=cache, **use)


def test_a_saved_cache_serves_again(tiny, trajectory, small, tmp_path):
    cache, _, use, ref = small
    cache.save(tmp_path / "cache.safetensors")
    for store in ("device", "disk", "auto"):
        again = masa.SourceCache.load(tmp_path / "cache.safetensors", tiny, store=store)
        assert again.store == ("device" if store == "auto" else store)
        assert again.nbytes == cache.nbytes
        assert torch.equal(masa.sample(tiny, cache=again, **use).latents, ref.latents)
    pictured = masa.record(tiny, controls=masa.MasaCtrl(1), trajectory=trajectory, progress=False)
    pictured.save(tmp_path / "picture.safetensors")
    again = masa.SourceCache.load(tmp_path / "picture.safetensors", tiny)
    assert torch.equal(again.trajectory.latents, trajectory.latents)
    assert again.trajectory.settings == trajectory.settings
    result, ref = (
        masa.sample(tiny, target=TARGETS[0], cache=c, progress=False, controls=[]) for c in (again, pictured)
    )
    assert torch.equal(result.latents, ref.latents)
    assert result.source.tobytes() == ref.source.tobytes()


def test_a_cache_on_disk_is_recorded_there(tiny, small, tmp_path):
    _, settings, use, ref = small
    path = tmp_path / "new" / "cache.safetensors"
    cache = masa.record(tiny, path=path, **settings)
    assert cache.store == "disk"
    assert str(path) in repr(cache)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size > cache.nbytes
    assert torch.equal(masa.sample(tiny, cache=cache, **use).latents, ref.latents)
    again = masa.SourceCache.load(path, tiny)
    assert torch.equal(masa.sample(tiny, cache=again, **use).latents, ref.latents)


def test_a_temporary_file_goes_with_its_cache(tiny, small):
    _, settings, use, ref = small
    cache = masa.record(tiny, store="disk", **settings)
    path = cache.path
    assert path.exists()
    assert torch.equal(masa.sample(tiny, cache=cache, **use).latents, ref.latents)
    del cache
    gc.collect()
    assert not path.parent.exists()


def test_an_interrupted_recording_leaves_nothing(tiny, small, tmp_path, monkeypatch):
    _, settings, _, _ = small
    monkeypatch.setattr("masa.cache.recorder.finish_file", lambda *args: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for place in ({"path": tmp_path / "cache.safetensors"}, {"store": "disk"}):
        with pytest.raises(ZeroDivisionError):
            masa.record(tiny, **place, **settings)
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_back_leaves_nothing(tiny, small, tmp_path, monkeypatch):
    _, settings, _, _ = small
    monkeypatch.setattr("masa.cache.recorder.FORMAT", "another format")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(masa.MasaError, match="is no source cache"):
        masa.record(tiny, store="disk", **settings)
    assert list(tmp_path.iterdir()) == []


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_files_are_let_go(tiny, small, trajectory, tmp_path):
    cache, _, use, ref = small
    path, other = tmp_path / "cache.safetensors", tmp_path / "trajectory.safetensors"
    cache.save(path)
    trajectory.save(other)
    with pytest.raises(masa.MasaError, match="is no source cache") as refused:  # its frames live here
        masa.SourceCache.load(other, tiny)
    assert refused.value is not None
    assert not is_mapped(other)
    half = replace(tiny, unet=copy.deepcopy(tiny.unet).half())
    with pytest.raises(masa.MasaError, match="the cache was recorded with") as refused:
        masa.SourceCache.load(path, half)
    assert refused.value is not None
    assert not is_mapped(path)
    read = masa.SourceCache.load(path, tiny, store="device")
    assert not is_mapped(path)
    assert torch.equal(masa.sample(tiny, cache=read, **use).latents, ref.latents)
    kept = masa.SourceCache.load(path, tiny, store="disk")
    assert is_mapped(path)
    assert torch.equal(masa.sample(tiny, cache=kept, **use).latents, ref.latents)


def test_the_store_goes_by_size(monkeypatch):
    free = {"cuda": 1000, "cpu": 3000}
    monkeypatch.setattr("masa.cache.storage.free_memory", lambda device: free[device.type])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [choose_store("auto", n, cuda) for n in (500, 501, 1500, 1501)] == ["device", "host", "host", "disk"]
    assert [choose_store("auto", n, cpu) for n in (1500, 1501)] == ["device", "disk"]
    assert choose_store("disk", 1, cuda) == "disk"
    assert choose_store("host", 1, cuda) == "host"


def test_the_size_is_as_said(tiny, small):
    cache, _, _, _ = small
    tokens, widths, rows = 8 * 16, (32, 64), 2
    # Two steps of keys and values: layers 10 to 12 at half the latents' size, 13 to 15 at the full one.
    held = 2 * 2 * rows * 3 * (tokens // 4 * widths[1] + tokens * widths[0]) * 4
    maps = 3 * 5 * rows * 77 * tokens // 16 * 4  # three steps of five layers at a quarter
    assert cache.nbytes == sum(t.nbytes for t in cache.tensors.values())
    assert cache.nbytes == held + maps
    assert "layers [10, 11, 12, 13, 14, 15], 2 of 3 steps" in repr(cache)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "a dog"}, "source is 'a dog', but the cache was recorded with 'a photo of a sitting cat'"),
        ({"seed": 4}, "seed is 4, but the cache was recorded with 3"),
        ({"generator": torch.Generator()}, "generator and cache"),
        ({"steps": 9}, "steps is 9"),
        ({"skip_steps": 1}, "skip_steps is 1"),
        ({"guidance_scale": 3.0}, "guidance_scale is 3.0"),
        ({"negative_prompt": "blurry"}, "negative_prompt is 'blurry'"),
        ({"height": 192}, "height is 192"),
        ({"pin_source": False}, "pin_source is False"),
        ({"eta": 0.5}, "eta is 0.5"),
        ({"schedule": masa.Schedule(offset=0)}, "schedule is"),
        ({"latents": torch.zeros(1, 4, 16, 24)}, "not what the cache was recorded from"),
        ({"targets_at_once": 0}, "targets_at_once is 0"),
        ({"controls": masa.MasaCtrl(0, 10)}, r"MasaCtrl reads the source's keys at .* \(layer 10\) in step 0"),
        ({"controls": masa.MasaCtrl(2, 3)}, r"keys at .* \(layer 3\) in step 2"),
        ({"controls": masa.StyleTransfer(2, 6)}, "StyleTransfer reads the source's queries"),
        ({"controls": masa.PromptToPrompt("refine")}, "PromptToPrompt reads the source's"),
        ({"controls": masa.PlugAndPlay()}, "PlugAndPlay reads the source's features"),
        ({"controls": masa.RecordAttention(layers=[13])}, "RecordAttention reads the source's attention maps"),
        ({"controls": masa.RecordQueries()}, "RecordQueries keeps what only a computed source has"),
        ({"controls": masa.RecordPredictions()}, "RecordPredictions keeps what only a computed source has"),
    ],
)
def test_what_contradicts_the_cache_is_refused(tiny, caches, monkeypatch, settings, message):
    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match=message):
        masa.sample(tiny, **({"target": TARGETS[1], "cache": caches["synthesis"][0], "progress": False} | settings))


@dataclass(frozen=True)
class ForOneTarget:
    """Reads the source's keys and values for one target alone."""

    branch: int
    needs_targets = True

    def begin(self, run):
        return ReadsForOne(self.branch)


class ReadsForOne(ActiveControl):
    name = "ForOneTarget"

    def __init__(self, branch):
        self.branch = branch

    def edits(self, step, branches):
        if self.branch not in branches.targets:
            return {}
        rows = tuple(
            source if row.branch == self.branch else i
            for i, (row, source) in enumerate(zip(branches.rows, branches.source_rows, strict=True))
        )
        return {2: Edit(k_from=rows, v_from=rows)}


@pytest.mark.parametrize("branch", [1, 3])
def test_every_part_is_checked_before_the_first_runs(tiny, caches, monkeypatch, branch):
    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    settings = {"target": TARGETS, "targets_at_once": 2, "cache": caches["synthesis"][0], "progress": False}
    with pytest.raises(masa.MasaError, match=r"ForOneTarget reads the source's keys at .* \(layer 1\) in step 0"):
        masa.sample(tiny, controls=ForOneTarget(branch), **settings)


def test_what_agrees_with_the_cache_is_taken(tiny, caches, trajectory):
    cache, start = caches["synthesis"]
    masa.sample(tiny, target=TARGETS[1], cache=cache, controls=[], **start)
    with pytest.raises(masa.MasaError, match="of different sources"):
        masa.sample(tiny, target=TARGETS[1], cache=cache, trajectory=trajectory)
    cache, start = caches["pinned"]
    masa.sample(tiny, target=TARGETS[1], cache=cache, controls=[], **start)
    other = replace(trajectory, latents=trajectory.latents + 1e-3)
    with pytest.raises(masa.MasaError, match="of different sources"):
        masa.sample(tiny, target=TARGETS[1], cache=cache, trajectory=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controls": []}, "controls are empty"),
        ({"controls": masa.RecordPredictions()}, "RecordPredictions reads nothing of the source"),
        ({"controls": masa.MasaCtrl(5)}, "selects no step"),
        ({"controls": masa.MasaCtrl(2, mask=masa.WordMasks("dog", "cat"))}, "'dog' is not in the prompt"),
        ({"latents": torch.zeros(2, 4, 16, 24)}, "record takes the source's"),
        ({"store": "gpu"}, "store is 'gpu'"),
        ({"store": "device", "path": "x"}, "a file is for store='disk'"),
    ],
)
def test_bad_recordings_are_refused(tiny, monkeypatch, settings, message):
    monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("ran first"))
    with pytest.raises(masa.MasaError, match=message):
        masa.record(tiny, SOURCE, **(SETTINGS | settings))


def test_another_model_is_refused(tiny, small, tmp_path):
    cache, _, use, _ = small
    unet = copy.deepcopy(tiny.unet)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 0.5
    other = replace(tiny, unet=unet)
    with pytest.raises(masa.MasaError, match="the cache was recorded with"):
        masa.sample(other, cache=cache, **use)
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(masa.MasaError, match="the cache was recorded with"):
        masa.SourceCache.load(tmp_path / "cache.safetensors", other)


def test_other_files_are_refused(tiny, trajectory, tmp_path):
    trajectory.save(tmp_path / "trajectory.safetensors")
    with pytest.raises(masa.MasaError, match="is no source cache"):
        masa.SourceCache.load(tmp_path / "trajectory.safetensors", tiny)
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(masa.MasaError, match="not a whole safetensors file"):
        masa.SourceCache.load(tmp_path / "text.safetensors", tiny)


def test_a_picture_of_a_cached_run_runs_again(tiny, small, tmp_path):
    cache, _, use, ref = small
    masa.sample(tiny, cache=cache, targets_at_once=1, **use).targets[0].save(tmp_path / "target.png")
    again = masa.rerun(tmp_path / "target.png", tiny, progress=False)
    assert again.settings["targets_at_once"] == 1
    same(again.latents, ref.latents)
