"""What the page's buttons do, without a browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from adapter_cases import make_adapter, save
from PIL import Image, ImageDraw

import masa
from masa.app import runs
from masa.app.asked import FIXED, MASACTRL, MASKED, P2P, PAINTED, PNP, STYLE, Adapter, Asked
from masa.app.drawings import drawing_of, heat_over, mask_over, painted_on, picture_of, word_mask
from masa.app.serve import Local, bind, own_adapters
from masa.app.sessions import Recorded, Session, Sessions
from masa.app.work import Cancelled, Done, Phase, Progress, Ticket, Worker
from masa.cli import main
from masa.cli.app_command import named
from masa.errors import MasaError

BASE = Asked(
    source="a photo of a sitting cat",
    targets="a photo of a running cat\n\n a red cat \n",
    methods=(MASACTRL,),
    start_step=1,
    start_layer=4,
    word_source="cat",
    word_target="cat",
    threshold=0.3,
    steps=3,
    guidance=5.0,
    seed=3,
    width=64,
    height=64,
)


def ellipse(size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L") -> Image.Image:
    picture = Image.new(mode, size, 0)
    ImageDraw.Draw(picture).ellipse(box, fill=255 if mode == "L" else (200, 120, 40))
    return picture


PICTURE = ellipse((64, 64), (8, 10, 50, 50), "RGB")
LEFT, RIGHT = ellipse((64, 64), (2, 5, 30, 60)), ellipse((64, 64), (34, 5, 62, 60))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "sketch.safetensors"
    return Adapter("sketch", "T2I-Adapter", str(save(path, make_adapter("full", 3).state_dict())))


@pytest.fixture
def desk(tiny, adapter, tmp_path):
    made = runs.Desk(tiny, Sessions(tmp_path), (adapter,))
    yield made
    made.worker.close()


@pytest.fixture
def session(desk):
    return desk.sessions.of("a tab")


def outcome_of(desk, session, asked):
    *told, outcome = runs.run(desk, session, asked)
    assert all(isinstance(one, Progress) for one in told)
    return outcome


class Calls:
    """Counts the rows that the UNet is given."""

    def __init__(self, sd):
        self.rows = 0
        self.handle = sd.unet.register_forward_pre_hook(self._add)

    def _add(self, _module, inputs):
        self.rows += len(inputs[2])  # of the context: two halves may be one row at first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# ------------------------------------------------------------------------------------------------ what is asked


def test_a_run_is_what_the_library_makes_of_it(desk, session):
    (name, result), *_ = outcome_of(desk, session, BASE).results
    made = masa.sample(
        desk.sd,
        BASE.source,
        ["a photo of a running cat", "a red cat"],
        controls=masa.MasaCtrl(1, 4),
        steps=3,
        guidance_scale=5.0,
        seed=3,
        width=64,
        height=64,
        progress=False,
    )
    assert name == MASACTRL
    assert torch.equal(result.latents, made.latents)


def test_an_edit_is_what_the_library_makes_of_it(desk, session):
    asked = replace(BASE, picture=PICTURE)
    result = outcome_of(desk, session, asked).results[0][1]
    made = masa.edit(
        desk.sd,
        PICTURE,
        list(asked.prompts),
        asked.source,
        controls=masa.MasaCtrl(1, 4),
        steps=3,
        guidance_scale=5.0,
        width=64,
        height=64,
        progress=False,
    )
    assert torch.equal(result.latents, made.latents)


WORDS, DRAWN = {"methods": (MASKED,)}, {"methods": (MASKED,), "mask": PAINTED, "mask_source": LEFT}
EDITED = {"picture": PICTURE}
LAYOUT = {"adapter": "sketch", "layout": ellipse((64, 64), (8, 10, 50, 50), "RGB")}
# field -> (what else is asked, another value)
CHANGES = {
    "source": ({}, "a dog"),
    "targets": ({}, "a photo of a running cat\na blue cat"),
    "picture": (EDITED, PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    "inverter": (EDITED, "negative-prompt"),
    "methods": ({}, (FIXED,)),
    "start_step": ({}, 2),
    "start_layer": ({}, 12),
    "mask": ({**WORDS, "mask_source": LEFT}, PAINTED),
    "word_source": (WORDS, "photo"),
    "word_target": ({**WORDS, "targets": "a photo of a running cat"}, "photo"),
    "threshold": (WORDS, 0.8),
    "mask_source": (DRAWN, RIGHT),
    "mask_target": (DRAWN, RIGHT),
    "p2p_edit": ({"methods": (P2P,), "targets": "a photo of a running dog"}, "replace"),
    "p2p_cross": ({"methods": (P2P,)}, 0.2),
    "p2p_self": ({"methods": (P2P,)}, 1.0),
    "pnp_features": ({"methods": (PNP,)}, 0.3),
    "pnp_attention": ({"methods": (PNP,)}, 1.0),
    "adapter": (LAYOUT, "none"),
    "layout": (LAYOUT, ellipse((64, 64), (30, 30, 60, 60), "RGB")),
    "layout_weight": (LAYOUT, 0.5),
    "layout_until": (LAYOUT, 0.5),
    "steps": ({}, 4),
    "guidance": ({}, 2.0),
    "negative": ({}, "grass"),
    "seed": ({}, 4),
    "width": ({}, 128),
    "height": ({}, 128),
    "sampler": ({}, "dpm++2m"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_control_acts(desk, session, name):
    beside, other = CHANGES[name]
    asked = replace(BASE, reuse=False, **beside)
    latents = [outcome_of(desk, session, one).results[0][1].latents for one in (asked, replace(asked, **{name: other}))]
    assert latents[0].shape != latents[1].shape or not torch.equal(*latents)


def test_the_list_of_controls_is_whole():
    assert {field.name for field in fields(Asked)} == {*CHANGES, "reuse", "keep_maps"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "no source prompt"),
        ({"picture": PICTURE, "targets": " \n"}, "needs a target prompt"),
        ({"methods": ()}, "choose at least one"),
        ({"targets": "\n".join(["a cat"] * 9)}, "9 target prompts; give 8"),
        ({"width": 2048, "height": 1024}, "2048x1024 pixels are too many"),
        ({"width": 100}, "expected a multiple of 64"),
        ({"steps": 0}, "steps is 0"),
        ({**WORDS, "word_source": ""}, "a word is missing"),
        ({**WORDS, "word_target": "dog"}, "'dog' is not in the prompt"),
        ({"methods": (MASKED,), "mask": PAINTED}, "nothing is painted"),
        ({"adapter": "sketch"}, "wants a layout"),
        ({"adapter": "pose", "layout": PICTURE}, "no adapter 'pose'"),
        ({"sampler": "none"}, "sampler is 'none'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(desk, session, changes, message):
    with Calls(desk.sd) as calls, pytest.raises(MasaError, match=message):
        outcome_of(desk, session, replace(BASE, **changes))
    assert calls.rows == 0
    assert not [path for path in session.folder.rglob("*") if path.is_file()]


def test_without_targets_the_source_alone_is_made(desk, session):
    outcome = outcome_of(desk, session, replace(BASE, targets="", methods=()))
    assert [path.name for path in outcome.files] == ["source.png"]


# ----------------------------------------------------------------------------------------- what is kept between runs


def test_a_picture_is_inverted_once_and_its_source_recorded_for_the_second_prompt(desk, session):
    rows = []
    for prompt in ("a running cat", "a jumping cat", "a red cat"):
        with Calls(desk.sd) as calls:
            outcome = outcome_of(desk, session, replace(BASE, picture=PICTURE, targets=prompt))
        rows.append(calls.rows)
        made = masa.edit(
            desk.sd, PICTURE, prompt, BASE.source, controls=masa.MasaCtrl(1, 4), steps=3, guidance_scale=5.0,
            width=64, height=64, progress=False,
        )  # fmt: skip
        # Equal to rounding only: below 128 pixels a side a target's bits depend on the rows beside it.
        assert torch.allclose(outcome.results[0][1].latents, made.latents, atol=1e-4)
    assert rows[0] > rows[1] > rows[2] == 6  # 3 steps, both halves of the one target
    assert len(session.inverted) == 1


def test_methods_share_one_source_and_start_from_its_noise(desk, session):
    every = (FIXED, MASACTRL, MASKED, P2P, PNP, STYLE)
    asked = replace(BASE, methods=every, targets="a photo of a running cat")
    with Calls(desk.sd) as calls:
        together = outcome_of(desk, session, asked)
    assert [name for name, _ in together.results] == list(every)
    assert calls.rows == 3 * 2 * (1 + len(every))
    with Calls(desk.sd) as calls:
        alone = outcome_of(desk, session, replace(asked, reuse=False))
    assert calls.rows > 3 * 2 * (1 + len(every))
    for (_, one), (_, other) in zip(together.results, alone.results, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-4)  # rounding, as above
        assert one.settings["seed"] == 3
    assert [path.name for path in together.files] == [
        *("source.png", "fixed-seed_0.png", "masactrl_0.png", "masactrl-masked_0.png", "prompt-to-prompt_0.png"),
        *("plug-and-play_0.png", "style_0.png", "sheet.png"),
    ]
    assert len(runs.masks_of(together)) == 2


def test_what_tabs_keep_is_bounded_and_their_own(desk, tmp_path):
    sessions = Sessions(tmp_path / "tabs", most=2)
    sessions.root.mkdir()
    one, two = sessions.of("one"), sessions.of("two")
    assert one is sessions.of("one")
    assert one is not two
    old = one.new_folder()
    (old / "x.png").touch()
    for _ in range(3):
        one.new_folder()
    assert not old.exists()
    assert two.folder.exists()
    sessions.of("three")  # two, unused for longest, goes
    assert not two.folder.exists()
    assert one.folder.exists()
    one.wait()
    ticket = one.ticket
    sessions.close("one")
    assert ticket.stop.is_set()
    assert not one.folder.exists()
    rest = [sessions.of("three"), sessions.of("four")]
    sessions.close_all()
    assert not any(session.folder.exists() for session in rest)

    asked = replace(BASE, picture=PICTURE)
    mine, other = desk.sessions.of("mine"), desk.sessions.of("other")
    outcome_of(desk, mine, asked)
    assert other.outcome is None
    assert not other.inverted
    for n in range(4):
        outcome_of(desk, mine, replace(asked, source=f"a cat {n}", steps=2))
    assert len(mine.inverted) == 3


def test_recorded_sources_of_all_tabs_fit_a_budget(tiny, tmp_path):
    settings = {"steps": 2, "height": 64, "width": 64, "progress": False}
    cache = masa.record(tiny, "a cat", controls=masa.MasaCtrl(0, 8), **settings)
    sessions = Sessions(tmp_path)
    first, second = sessions.of("first"), sessions.of("second")
    sessions.keep_recorded(first, Recorded("a", cache), most=cache.nbytes)
    assert first.recorded is not None
    sessions.keep_recorded(second, Recorded("b", cache), most=cache.nbytes)
    assert first.recorded is None
    assert second.recorded is not None


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("picture", [None, PICTURE], ids=["synthesised", "edited"])
@pytest.mark.parametrize("changes", [{}, DRAWN, LAYOUT], ids=["plain", "painted mask", "layout"])
def test_a_png_alone_repeats_its_run(desk, session, tmp_path, picture, changes):
    outcome = outcome_of(desk, session, replace(BASE, picture=picture, **changes))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = shutil.copy(outcome.files[1], elsewhere / "mine.png")
    desk.sessions.close("a tab")  # whatever the page held is gone
    again = masa.rerun(file, desk.sd, progress=False)
    assert torch.equal(again.latents, outcome.results[0][1].latents)
    with Image.open(file) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(again.targets[0]))


def test_a_trajectory_carries_its_picture(tiny, tmp_path):
    trajectory = masa.invert(tiny, PICTURE, "a cat", steps=2, height=64, width=64, progress=False)
    out = masa.sample(tiny, target="a dog", trajectory=trajectory.with_picture(PICTURE), controls=[], progress=False)
    out.targets[0].save(tmp_path / "a.png")
    assert torch.equal(masa.rerun(tmp_path / "a.png", tiny, progress=False).latents, out.latents)
    out = masa.sample(tiny, target="a dog", trajectory=trajectory, controls=[], progress=False)
    out.targets[0].save(tmp_path / "b.png")
    with pytest.raises(MasaError, match="given as pixels"):
        masa.rerun(tmp_path / "b.png", tiny, progress=False)


def test_settings_are_told_in_full(desk, session):
    told = dict(runs.settings_of(outcome_of(desk, session, replace(BASE, seed=None, negative="grass"))))
    assert told["target 2"] == "a red cat"
    assert told[MASACTRL].startswith("MasaCtrl(start_step=1, start_layer=4")
    assert told["seed"].isdecimal()
    assert (told["steps"], told["guidance"], told["size"], told["negative prompt"]) == ("3", "5.0", "64x64", "grass")


# --------------------------------------------------------------------------------------------------- while it runs


def test_progress_grows_shows_pictures_and_tells_the_time_left(desk, session, monkeypatch):
    monkeypatch.setattr("masa.app.work.REFRESH", 0.001)
    *told, _ = runs.run(desk, session, replace(BASE, picture=PICTURE, steps=6))
    shares = [one.share for one in told]
    assert shares == sorted(shares)
    assert shares[-1] < 1.0
    assert any("inverting the picture, step" in one.text for one in told)
    assert any(one.seconds_left is not None and one.seconds_left > 0 for one in told)
    seen = next(one.seen for one in reversed(told) if one.seen)
    assert [name for name, _ in seen] == ["source", *BASE.prompts]
    assert {picture.size for _, picture in seen} == {(64, 64)}


def test_the_share_weighs_phases_by_their_rows():
    ticket = Ticket()
    ticket.plan([Phase("one", 2, 1.0), Phase("two", 4, 2.0)])
    ticket.begin()
    assert ticket.progress().share == 0.0
    assert ticket.progress().seconds_left is None
    ticket.count()
    ticket.count()
    assert ticket.progress().share == pytest.approx(0.1)
    assert ticket.progress().text == "one, step 2 of 2"
    for _ in range(5):  # more than was planned
        ticket.count()
    assert ticket.progress().share == pytest.approx(0.2)
    ticket.begin()
    ticket.count()
    assert ticket.progress().share == pytest.approx(0.2)
    for _ in range(9):  # more than was planned
        ticket.count()
    assert ticket.progress().share < 1.0
    ticket.stop.set()
    assert ticket.progress().text == "stopping"


def test_cancel_acts_within_a_step_and_leaves_nothing(desk, session):
    """Told to stop while a layer of the UNet's third call works, no further layer is entered."""
    seen = {"calls": 0, "layers after": 0}

    def stop(_module, _inputs):
        seen["calls"] += 1
        if seen["calls"] == 3:
            session.cancel()

    def after(_module, _inputs):
        seen["layers after"] += session.ticket is not None and session.ticket.stop.is_set()

    unet = desk.sd.unet
    handles = [
        unet.mid_block.resnets[0].register_forward_pre_hook(stop),
        unet.up_blocks[0].resnets[0].register_forward_pre_hook(after),
    ]
    try:
        with pytest.raises(Cancelled):
            outcome_of(desk, session, BASE)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"calls": 3, "layers after": 0}
    assert not [path for path in session.folder.rglob("*") if path.is_file()]
    assert session.outcome is None
    hooked = [m for net in (unet, desk.sd.vae, desk.sd.text_encoder) for m in net.modules() if m._forward_pre_hooks]
    assert not hooked
    assert outcome_of(desk, session, BASE).results  # and the page goes on


def test_a_run_that_waits_is_cancelled_before_it_begins(desk, session):
    session.wait()
    assert session.cancel()
    with Calls(desk.sd) as calls, pytest.raises(Cancelled):
        outcome_of(desk, session, BASE)
    assert calls.rows == 0
    assert not session.cancel()  # there is nothing to stop any more


def test_a_run_whose_page_is_gone_stops(desk, session):
    told = runs.run(desk, session, replace(BASE, steps=50))
    next(told)
    ticket = session.ticket
    told.close()
    assert ticket.stop.is_set()
    assert session.ticket is None
    done = [one for one in desk.worker.follow(lambda ticket: "next", Ticket()) if isinstance(one, Done)]
    assert done == [Done("next")]


def test_one_page_has_one_run_and_all_pages_one_worker(desk, session):
    with session.working(), pytest.raises(MasaError, match="at work already"):
        outcome_of(desk, session, BASE)
    worker, order = Worker(desk.sd), []
    first = worker.follow(lambda ticket: order.append("first begins") or [order.append("first ends")], Ticket())
    second = worker.follow(lambda ticket: order.append("second"), Ticket())
    list(first)
    list(second)
    worker.close()
    assert order == ["first begins", "first ends", "second"]


def test_warnings_are_told_and_told_again_for_a_kept_picture(tmp_path, monkeypatch):
    sd = masa.load(dtype="fp32", progress=False)
    desk = runs.Desk(sd, Sessions(tmp_path))
    session = desk.sessions.of("a tab")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    asked = Asked(source="", targets="a cat", picture=noise, start_step=0, steps=1, width=128, height=128)
    for _ in range(2):
        assert any("knows a small drawn world" in note for note in outcome_of(desk, session, asked).notes)
    desk.worker.close()


# ------------------------------------------------------------------------------------------------ masks and attention


def last(told):
    return list(told)[-1]


def test_a_words_mask_is_found_once_and_cut_anew(desk, session):
    asked = replace(BASE, picture=PICTURE)
    with Calls(desk.sd) as calls:
        shown = last(runs.find_mask(desk, session, asked))
    assert calls.rows == runs.MAP_STEPS
    with Calls(desk.sd) as calls:
        again = last(runs.find_mask(desk, session, replace(asked, threshold=0.9)))
    assert calls.rows == 0
    assert shown.size == again.size == (256, 256)
    assert shown.tobytes() != again.tobytes()
    assert runs.mask_again(session, 0.3).tobytes() == shown.tobytes()
    other = last(runs.find_mask(desk, session, replace(asked, word_source="photo")))
    assert other.tobytes() != shown.tobytes()


def test_a_mask_is_shown_on_the_last_source_where_there_is_no_picture(desk, session):
    with pytest.raises(MasaError, match="no picture to show a mask on"):
        last(runs.find_mask(desk, session, BASE))
    outcome_of(desk, session, BASE)
    assert last(runs.find_mask(desk, session, BASE)).size == (256, 256)
    with pytest.raises(MasaError, match="'dog' is not in the prompt"):
        last(runs.find_mask(desk, session, replace(BASE, word_source="dog")))


def test_attention_of_a_clicked_word(desk, session):
    outcome = outcome_of(desk, session, BASE)
    assert runs.words_of(outcome) == ["a", "photo", "of", "sitting", "cat", "running", "red"]
    assert [label for label, _ in runs.attention_of(desk.sd, outcome, "cat")] == [
        *("source", "MasaCtrl: a photo of a running cat", "MasaCtrl: a red cat")
    ]
    assert [label for label, _ in runs.attention_of(desk.sd, outcome, "red")] == ["MasaCtrl: a red cat"]
    with pytest.raises(MasaError, match="no prompt of this run"):
        runs.attention_of(desk.sd, outcome, "dog")
    with pytest.raises(MasaError, match="kept no attention maps"):
        runs.attention_of(desk.sd, outcome_of(desk, session, replace(BASE, keep_maps=False)), "cat")


def test_a_lit_map_is_bright_where_the_word_looked():
    attention = torch.zeros(4, 4)
    attention[:2] = 1.0
    lit = np.asarray(heat_over(Image.new("RGB", (256, 256), (90, 90, 90)), attention), dtype=int).sum(-1)
    assert lit[:96].mean() > 2 * lit[160:].mean()
    mask = word_mask(attention, 0.5, (8, 8))
    assert mask[:4].all()
    assert not mask[4:].any()
    assert not word_mask(torch.ones(4, 4), 0.5, (8, 8)).any()  # says nothing
    tinted = np.asarray(mask_over(Image.new("RGB", (64, 64), "blue"), mask), dtype=int)
    assert tinted[0, 0, 0] > 100
    assert tinted[-1, -1].tolist() == [0, 0, 255]


def test_what_an_editor_gives():
    clear, stroke = Image.new("RGBA", (64, 128)), Image.new("RGBA", (64, 128))
    ImageDraw.Draw(stroke).rectangle((10, 10, 20, 20), fill=(255, 255, 255, 255))
    background = Image.new("RGB", (64, 128), "black")
    assert picture_of(None) is painted_on(None) is drawing_of(None) is None
    assert picture_of({"background": clear, "layers": [clear]}) is None
    assert painted_on({"background": background, "layers": [clear]}) is None
    assert painted_on({"background": background, "layers": [clear, stroke]}).getbbox() == (10, 10, 21, 21)
    assert drawing_of({"background": background, "layers": [clear]}) is None  # an empty black canvas
    assert drawing_of({"background": background, "layers": [stroke]}).getbbox() == (10, 10, 21, 21)
    assert drawing_of({"background": PICTURE, "layers": []}).tobytes() == PICTURE.tobytes()


# ------------------------------------------------------------------------------------------------------- serving


def test_a_taken_port_and_a_missing_extra_are_one_line_each(monkeypatch, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
        error = capsys.readouterr().err
        assert f"--port {port}" in error
        assert error.count("\n") == 1
    for host, number in (("nowhere.invalid", 0), ("127.0.0.1", 70000)):
        with pytest.raises(MasaError, match="cannot be served"):
            bind(host, number)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install 'masa[app]'" in capsys.readouterr().err


def test_it_serves_this_machine_alone_unless_told():
    with bind("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_adapters_are_looked_for_before_the_model(capsys, adapter, tiny):
    assert main(["app", "--t2i-adapter", "nothing.safetensors"]) == 2
    assert "no T2I-Adapter at nothing.safetensors" in capsys.readouterr().err
    assert named([adapter.path], "ControlNet") == [Adapter("sketch (ControlNet)", "ControlNet", adapter.path)]
    with pytest.raises(MasaError, match="two adapters are named sketch"):
        named([adapter.path, adapter.path], "T2I-Adapter")
    assert own_adapters(tiny) == ()


def test_gradio_is_imported_where_a_page_is_built_only():
    code = (
        "import sys, masa, masa.cli, masa.app, masa.app.runs; "
        "print([name for name in ('gradio', 'uvicorn', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pages_name_no_other_server_and_forbid_them():
    page = b'<head><meta property="og:image" content="https://elsewhere.example/a.png"\n/><title>masa</title>'
    page += b'<script>example = "https://github.com/gradio-app/gradio/raw/main/a.pdf"</script></head>'
    sent = []

    async def app(scope, receive, send):
        assert (b"accept-encoding", b"gzip") not in scope["headers"]
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(page)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page[:30], "more_body": True})
        await send({"type": "http.response.body", "body": page[30:]})

    async def send(message):
        sent.append(message)

    step = Local(app)({"type": "http", "headers": [(b"accept-encoding", b"gzip")]}, None, send)
    with pytest.raises(StopIteration):
        step.send(None)
    headers = dict(sent[0]["headers"])
    assert sent[1]["body"] == b'<head><title>masa</title><script>example = ""</script></head>'
    assert headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    assert headers[b"content-security-policy"].startswith(b"default-src 'self';")


def test_a_session_of_its_own_folder(tmp_path):
    session = Session(tmp_path / "a")
    assert session.new_folder().parent == tmp_path / "a"
