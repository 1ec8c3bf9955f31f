"""A source's condition in its inversion: each method equal to a hand-written loop over diffusers, or refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from adapter_cases import (
    ROUNDING,
    SOURCE,
    STEPS,
    TARGETS,
    SteeredOracle,
    adapter_residuals,
    controlnet_residuals,
    differs,
    make_adapter,
    make_controlnet,
    original_adapter_keys,
    picture,
    same,
    save,
)
from PIL import Image
from published import Control
from published_inversions import InversionOracle

import masa
from masa.config import IPAdapterConfig
from masa.models.ip_adapter import IPAdapterNetwork
from masa.runtime.adapters import in_file_order

SHOWN, OTHER = picture(2), picture(5)
QUIET = {"steps": STEPS, "progress": False}


@pytest.fixture(scope="module")
def nets():
    return make_adapter("full"), make_controlnet(0, 0.5)


@pytest.fixture(scope="module")
def files(nets, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    ip = IPAdapterNetwork(IPAdapterConfig(48, 32, 4), [site.width for site in in_file_order(tiny.unet.sites)])
    return {
        "adapter": save(folder / "adapter.safetensors", original_adapter_keys(nets[0].state_dict())),
        "net": save(folder / "net.safetensors", nets[1].state_dict()),
        "ip": save(folder / "ip.safetensors", ip.state_dict()),
    }


@pytest.fixture(scope="module")
def steering(files):
    """An adapter in the noisier half of the steps, a ControlNet in those between."""
    adapter = masa.T2IAdapter(files["adapter"], SHOWN, weight=0.8, tau=0.5)
    return [adapter, masa.ControlNet(files["net"], OTHER, scale=0.6, start=0.25, end=0.75)]


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, 128, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1


def added(nets, halves):
    """What the two of `steering` add, by diffusers."""
    one = adapter_residuals([(nets[0], [SHOWN], 0.8, 2)], halves)
    other = controlnet_residuals([(nets[1], [OTHER], 0.6, range(1, 3))], halves)
    return lambda *given: {**one(*given), **other(*given)}


class SteeredInversions(InversionOracle):
    """The published inversions, whose every prediction has residuals beside, by its rows."""

    def steer(self, nets):
        unet, places = self.unet, {t: i for i, t in enumerate(self.timesteps(STEPS))}

        def steered(x, t, context):
            return unet.plain(x, t, context, **added(nets, len(x))(places[t], t, x, context))

        unet.plain, unet.forward = unet.forward, steered


def test_ddim_is_the_published_loop_with_residuals(tiny, tiny_folder, nets, steering, image):
    for guidance in (1.0, 2.0):
        oracle = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS)
        oracle.residuals = added(nets, 2 if guidance > 1 else 1)
        trajectory = masa.invert(tiny, image, SOURCE, guidance_scale=guidance, controls=steering, **QUIET)
        ref = torch.cat(oracle.invert(trajectory.latents[:1], SOURCE, STEPS, guidance))
        same(trajectory.latents, ref)
        differs(masa.invert(tiny, image, SOURCE, guidance_scale=guidance, **QUIET).latents, ref)


def test_each_control_takes_part_in_its_own_steps(tiny, steering, image):
    whole = masa.invert(tiny, image, SOURCE, controls=steering, **QUIET).latents
    plain = masa.invert(tiny, image, SOURCE, **QUIET).latents
    assert torch.equal(whole[:2], plain[:2])  # the least noisy step has neither
    differs(whole[2], plain[2], 1e-3)
    for other in (
        [replace(steering[0], tau=1.0), steering[1]],
        [replace(steering[0], weight=0.4), steering[1]],
        [steering[0], replace(steering[1], start=0.5)],
        [steering[0], replace(steering[1], source=picture(7))],
        steering[:1],
    ):
        differs(masa.invert(tiny, image, SOURCE, controls=other, **QUIET).latents, whole, 1e-3)
    nothing = [replace(steering[0], weight=0.0), replace(steering[1], scale=0.0)]
    assert torch.equal(masa.invert(tiny, image, SOURCE, controls=nothing, **QUIET).latents, plain)


@pytest.mark.slow
def test_null_text_is_the_published_algorithm_with_residuals(tiny, tiny_folder, nets, steering, image):
    trajectory = masa.invert(tiny, image, SOURCE, method="null-text", controls=steering, **QUIET)
    oracle = SteeredInversions(tiny_folder, tiny.tokenizer)
    oracle.steer(nets)
    ref = oracle.null_text([x[None] for x in trajectory.latents], SOURCE, STEPS, 7.5)
    # Adam's steps are of a fixed size: rounding may turn one of a component whose gradient is nearly 0.
    assert (trajectory.context - torch.cat(ref)).abs().mean() < 1e-3
    plain = masa.invert(tiny, image, SOURCE, method="null-text", **QUIET)
    assert (trajectory.context - plain.context).abs().mean() > 1e-2


def test_edit_friendly_noise_is_of_the_steered_prediction(tiny, tiny_folder, nets, steering, image):
    trajectory = masa.invert(tiny, image, SOURCE, method="edit-friendly", controls=steering, seed=5, **QUIET)
    plain = masa.invert(tiny, image, SOURCE, method="edit-friendly", seed=5, **QUIET)
    oracle = SteeredInversions(tiny_folder, tiny.tokenizer)
    oracle.steer(nets)
    draws = []
    for k, t in enumerate(oracle.timesteps(STEPS)[::-1]):  # the noise in each picture
        a = oracle.alpha(t)
        draws.append((trajectory.latents[k + 1] - a.sqrt() * trajectory.latents[0]) / (1 - a).sqrt())
    _, ref = oracle.edit_friendly(trajectory.latents[:1], torch.stack(draws), SOURCE, STEPS)
    same(trajectory.noise, torch.cat(ref))
    assert torch.equal(trajectory.latents, plain.latents)
    differs(plain.noise, trajectory.noise)


def test_edit_friendly_noise_leads_back_under_the_same_condition_alone(tiny, steering, image):
    """The recorded noise makes up for exactly the prediction that the inversion saw, whatever the network."""
    trajectory = masa.invert(tiny, image, SOURCE, method="edit-friendly", controls=steering, seed=5, **QUIET)
    usual = {"trajectory": trajectory, "pin_source": False, "skip_steps": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = masa.sample(tiny, controls=steering, **usual).latents
    with pytest.warns(UserWarning, match="was inverted with ControlNet and T2IAdapter, and the run gives it no condit"):
        astray = masa.sample(tiny, controls=[], **usual).latents
    start = trajectory.latents[:1]
    assert (back - start).abs().max() < 1e-3 * trajectory.latents[-1].std()
    assert (astray - start).abs().max() > 0.1 * trajectory.latents[-1].std()


def test_an_edit_inverts_with_the_sources_condition_alone(tiny, files, steering, image):
    adapter = masa.T2IAdapter(files["adapter"], SHOWN, [picture(0), None], tau=0.5)
    controls = [masa.MasaCtrl(1, 8), adapter, masa.ControlNet(files["net"], target=OTHER, scale=0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = masa.edit(tiny, image, TARGETS, SOURCE, controls=controls, **QUIET)
    trajectory = masa.invert(tiny, image, SOURCE, controls=replace(adapter, target=None), **QUIET)
    ref = masa.sample(tiny, target=TARGETS, controls=controls, trajectory=trajectory, progress=False)
    assert torch.equal(out.latents, ref.latents)
    told = out.settings["trajectory"]
    assert [control["kind"] for control in told["controls"]] == ["T2IAdapter"]
    assert told["controls"][0]["target"] is None
    assert told["source_conditions"] == trajectory.settings["source_conditions"] != []
    differs(masa.edit(tiny, image, TARGETS, SOURCE, controls=controls[::2], **QUIET).latents[1:], out.latents[1:])


def test_other_conditions_of_the_source_are_a_warning(tiny, files, image):
    adapter = masa.T2IAdapter(files["adapter"], SHOWN)
    trajectory = masa.invert(tiny, image, SOURCE, controls=adapter, **QUIET)
    for other, message in (
        (
            replace(adapter, source=OTHER),
            "and the run gives it T2IAdapter of another picture, file or weight",
        ),
        (replace(adapter, weight=0.5), "of another picture, file or weight"),
        (masa.T2IAdapter(files["adapter"], target=SHOWN), "the run gives it no condition"),
        ([adapter, masa.ControlNet(files["net"], SHOWN)], "the run gives it ControlNet and T2IAdapter"),
    ):
        with pytest.warns(UserWarning, match=message):
            masa.sample(tiny, target=TARGETS[0], controls=other, trajectory=trajectory, progress=False)
    recorded = {"trajectory": trajectory, "progress": False}
    with pytest.warns(UserWarning, match="the run gives it no condition"):
        masa.record(tiny, controls=masa.MasaCtrl(1, 8), **recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = masa.record(tiny, controls=[masa.MasaCtrl(1, 8), adapter], **recorded)
        masa.sample(tiny, target=TARGETS[0], controls=[masa.MasaCtrl(1, 8), adapter], cache=cache, progress=False)
        noise = masa.invert(tiny, image, method="noise", **QUIET)  # predicts nothing
        masa.sample(tiny, target=TARGETS[0], controls=adapter, trajectory=noise, progress=False)


def test_a_trajectory_keeps_its_condition_in_its_file(tiny, steering, image, tmp_path):
    made = masa.invert(tiny, image, SOURCE, controls=steering, **QUIET)
    made.save(tmp_path / "t.safetensors")
    loaded = masa.Trajectory.load(tmp_path / "t.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masa.sample(tiny, controls=steering, trajectory=loaded, progress=False)
    with pytest.warns(UserWarning, match="was inverted with ControlNet and T2IAdapter"):
        masa.sample(tiny, controls=[], trajectory=loaded, progress=False)


def test_a_conditioned_edit_is_repeated_from_its_picture(tiny, steering, image, tmp_path):
    shown = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(shown).save(tmp_path / "photo.png")
    out = masa.edit(tiny, tmp_path / "photo.png", TARGETS[0], SOURCE, controls=steering, **QUIET)
    out.save(tmp_path / "out")
    again = masa.rerun(tmp_path / "out" / "target_0.png", tiny, progress=False)
    assert torch.equal(again.latents, out.latents)


def test_what_has_no_part_in_an_inversion_is_refused(tiny, files, steering, image):
    embedding = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    ip = masa.IPAdapter(files["ip"], embedding)
    guess = masa.ControlNet(files["net"], SHOWN, guess_mode=True)
    for controls, settings, message in (
        (masa.MasaCtrl(), {}, "MasaCtrl acts on targets, and there are none"),
        (masa.T2IAdapter(files["adapter"], target=SHOWN), {}, "T2IAdapter acts on targets, and there are none"),
        (masa.FreeU(), {}, "FreeU has no part in an inversion"),
        (steering, {"method": "noise"}, "'noise' predicts nothing that controls could steer"),
        (ip, {"method": "negative-prompt"}, "needs both halves of guidance alike, and IPAdapter tells them apart"),
        (guess, {"method": "negative-prompt"}, "and ControlNet tells them apart"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            masa.invert(tiny, image, SOURCE, controls=controls, **settings, **QUIET)
    with pytest.raises(masa.MasaError, match="and IPAdapter tells them apart"):
        masa.edit(tiny, image, TARGETS, SOURCE, controls=ip, method="negative-prompt", **QUIET)


def test_an_image_prompt_takes_part_too_and_tells_halves_apart(tiny, files, image):
    ip = masa.IPAdapter(files["ip"], 5 * torch.randn(1, 48, generator=torch.Generator().manual_seed(0)))
    plain = masa.invert(tiny, image, SOURCE, **QUIET).latents
    shown = masa.invert(tiny, image, SOURCE, controls=ip, **QUIET).latents
    differs(shown, plain, 1e-3)
    # An empty prompt has two equal halves, unless one of them sees a picture.
    guided = masa.invert(tiny, image, "", controls=ip, guidance_scale=4.0, **QUIET).latents
    differs(guided, masa.invert(tiny, image, "", controls=ip, **QUIET).latents, 1e-3)


def test_a_sheet_inverts_each_condition_once(tiny, files, image, monkeypatch):
    from masa.workflows import sheets

    seen, invert = [], sheets.invert

    def counted(*args, controls=(), **settings):
        seen.append([type(control).__name__ for control in controls])
        return invert(*args, controls=controls, **settings)

    monkeypatch.setattr(sheets, "invert", counted)
    adapter = masa.T2IAdapter(files["adapter"], SHOWN, picture(0))
    columns = {"plain": (), "one": adapter, "again": [masa.MasaCtrl(1, 8), adapter]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = {"steps": STEPS, "seed": 0, "progress": False}
        masa.grid(tiny, image, TARGETS[0], SOURCE, methods=["ddim", "noise"], controls=columns, **usual)
        assert seen == [[], ["T2IAdapter"], []]
        seen.clear()
        rows, shown = ("weight", [0.5, 1.0]), ("guidance_scale", [2.0, 4.0])
        masa.sweep(tiny, SOURCE, TARGETS[0], rows, shown, image=image, control=adapter, **usual)
        assert seen == [["T2IAdapter"]] * 2


def test_the_oracle_without_residuals_is_the_published_one(tiny, tiny_folder, image):
    oracle = SteeredOracle(tiny_folder, tiny.tokenizer, STEPS)
    oracle.hook(Control())
    plain = masa.invert(tiny, image, SOURCE, **QUIET).latents
    same(plain, torch.cat(oracle.invert(plain[:1], SOURCE, STEPS, 1.0)), ROUNDING)
