"""The page's layout, and which control calls what."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from masa.app import runs
from masa.app.asked import (
    BY_WORD,
    INVERTERS,
    MASACTRL,
    MASKED,
    METHODS,
    MOST_STEPS,
    NO_LAYOUT,
    P2P,
    PAINTED,
    PNP,
    Asked,
)
from masa.app.drawings import drawing_of, enlarged, figures, painted_on, picture_of
from masa.app.runs import Desk
from masa.app.sessions import Outcome
from masa.app.work import Cancelled, Progress
from masa.errors import MasaError
from masa.io.pictures import MULTIPLE, target_size
from masa.samplers import NAMES

PROMPT, PICTURE = "a prompt", "a picture"
MASK_COLOUR = "#e6283cb0"
LARGEST = 1024  # pixels of a side
# How events are run: at once, or one at a time of all tabs. Neither is an API for programs, which is Python's.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
QUEUED: dict[str, Any] = {
    "concurrency_limit": 1,
    "concurrency_id": "model",
    "show_progress": "hidden",
    "api_visibility": "private",
}
REFUSED = (MasaError, OSError, ValueError)

# Fonts of the reader's own machine: nothing is loaded for them.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_text_color="white",
    block_label_text_color="*neutral_700",
    block_info_text_color="*neutral_600",
    block_title_text_color="*neutral_800",
)

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

STEP_NOTE = (
    "Paper, figure 8: from the first steps on, the target keeps the source's layout and hardly follows its prompt; "
    "begun late, the source's look is lost."
)
LAYER_NOTE = (
    "Paper, figure 8: from the first layers on, the source is copied; from the decoder on (10), pose and look both "
    "come right; the last layers alone carry too little over."
)


class Page:
    """The components of one page, by what they are for."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.fields: dict[str, Any] = {}  # by the field of Asked that they fill
        with gr.Blocks(title="masa", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as self.blocks:
            gr.HTML(_header(desk), elem_id="header")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=340):
                    self._add_source()
                    self._add_methods()
                    self._add_layout()
                    self._add_settings()
                with gr.Column(scale=6, min_width=340, elem_id="right"):
                    self._add_results()
            self._connect()

    # ------------------------------------------------------------------------------------------------- layout

    def _add_source(self) -> None:
        with gr.Group():
            self.kind = gr.Radio([PROMPT, PICTURE], value=PROMPT, label="The source is", elem_id="kind")
            with gr.Column(visible=False) as self.picture_part:
                self.fields["picture"] = _editor(
                    "Picture",
                    MASK_COLOUR,
                    "picture",
                    crop=True,
                )
                gr.HTML(
                    "<p>The picture tool crops; the brush paints the mask, where one is to be painted.</p>",
                    elem_classes="hint",
                )
                self.fields["inverter"] = gr.Dropdown(
                    list(INVERTERS),
                    value="ddim",
                    label="Inversion",
                    info="Done once for a picture, its prompt and the steps; kept for further prompts.",
                )
            self.fields["source"] = gr.Textbox(
                value=self._example(0), label="Source prompt", info="What the source shows.", elem_id="source"
            )
            self.fields["targets"] = gr.Textbox(
                value=self._example(1),
                label="Target prompts, one a line",
                info="What it is to become. None: the source alone.",
                lines=2,
                elem_id="targets",
            )

    def _example(self, place: int) -> str:
        """Prompts to begin with, that the model can draw."""
        if self.desk.sd.origin.checkpoint == "demo":
            return ("a photo of a cat sitting, facing left", "a photo of a cat standing, facing left")[place]
        return ("a photo of a sitting cat", "a photo of a standing cat")[place]

    def _add_methods(self) -> None:
        defaults = self.desk.defaults
        with gr.Group():
            self.fields["methods"] = gr.CheckboxGroup(
                list(METHODS),
                value=[MASACTRL],
                label="Methods",
                info="Several run side by side, from the same noise.",
                elem_id="methods",
            )
            self.fields["start_step"] = gr.Slider(
                0,
                max(1, defaults.steps - 1),
                value=defaults.start_step,
                step=1,
                label="MasaCtrl from step (S)",
                info=STEP_NOTE,
                elem_id="start_step",
            )
            self.fields["start_layer"] = gr.Slider(
                0,
                15,
                value=defaults.start_layer,
                step=1,
                label="MasaCtrl from layer (L)",
                info=LAYER_NOTE,
                elem_id="start_layer",
            )
        self._add_masks()
        with gr.Group(visible=False) as self.p2p_part:
            self.fields["p2p_edit"] = gr.Radio(
                ["refine", "replace"],
                value="refine",
                label="Prompt-to-Prompt",
                info="refine: words are added; replace: swapped one for one.",
            )
            with gr.Row():
                self.fields["p2p_cross"] = gr.Slider(
                    0, 1, value=0.8, step=0.05, label="Share of steps, cross-attention"
                )
                self.fields["p2p_self"] = gr.Slider(0, 1, value=0.4, step=0.05, label="Share of steps, self-attention")
        with gr.Group(visible=False) as self.pnp_part, gr.Row():
            self.fields["pnp_features"] = gr.Slider(0, 1, value=0.8, step=0.05, label="Plug-and-Play: steps, features")
            self.fields["pnp_attention"] = gr.Slider(
                0, 1, value=0.5, step=0.05, label="Plug-and-Play: steps, attention"
            )

    def _add_masks(self) -> None:
        with gr.Group(visible=False) as self.mask_part:
            self.fields["mask"] = gr.Radio(
                [BY_WORD, PAINTED],
                value=BY_WORD,
                label="Mask of the subject",
                info="Subject looks at subject, background at background. Of a picture, paint on the picture.",
                elem_id="mask",
            )
            with gr.Column() as self.word_part:
                with gr.Row():
                    self.fields["word_source"] = gr.Textbox(
                        value="cat", label="Word in the source prompt", elem_id="word_source"
                    )
                    self.fields["word_target"] = gr.Textbox(
                        value="cat", label="Word in the target prompts", elem_id="word_target"
                    )
                self.fields["threshold"] = gr.Slider(
                    0, 1, value=0.1, step=0.01, label="Threshold of its attention", elem_id="threshold"
                )
                self.show_mask = gr.Button("Show the mask", size="sm", elem_id="show_mask")
                self.mask_shown = gr.HTML(elem_id="mask_shown", elem_classes="pictures")
            with gr.Column(visible=False) as self.paint_part:
                with gr.Column() as self.paint_source_part:
                    self.fetch_source = gr.Button("Bring the last source here to paint on", size="sm")
                    self.fields["mask_source"] = _editor("Brush over the subject", MASK_COLOUR, "mask_source")
                self.moves = gr.Checkbox(
                    value=False,
                    label="The subject moves",
                    info="Else it is expected at the same place in the targets.",
                    elem_id="moves",
                )
                with gr.Column(visible=False) as self.paint_target_part:
                    self.fetch_target = gr.Button("Bring the picture here to paint on", size="sm", elem_id="fetch")
                    self.fields["mask_target"] = _editor("Brush over where it is to be", MASK_COLOUR, "mask_target")

    def _add_layout(self) -> None:
        names = [adapter.name for adapter in self.desk.adapters]
        with gr.Accordion("Layout by a drawing", open=False, visible=bool(names), elem_id="layout_part"):
            self.fields["adapter"] = gr.Dropdown(
                [NO_LAYOUT, *names],
                value=NO_LAYOUT,
                label="Adapter",
                info="Draw, or upload, white lines on black: they say where the targets' things are.",
                elem_id="adapter",
            )
            with gr.Column(visible=False) as self.drawing_part:
                black = Image.new("RGB", (512, 512), "black")
                self.fields["layout"] = _editor("Drawing", "#ffffff", "layout", black, brush=7)
                with gr.Row():
                    self.fields["layout_weight"] = gr.Slider(0, 2, value=1.0, step=0.05, label="Weight")
                    self.fields["layout_until"] = gr.Slider(0, 1, value=1.0, step=0.05, label="Share of the steps")

    def _add_settings(self) -> None:
        defaults = self.desk.defaults
        size: dict[str, Any] = {"minimum": MULTIPLE, "maximum": LARGEST, "step": MULTIPLE, "value": defaults.size}
        with gr.Accordion("Run settings", open=False, elem_id="settings_part"):
            with gr.Row():
                self.fields["steps"] = gr.Slider(
                    1, MOST_STEPS, value=defaults.steps, step=1, label="Steps", elem_id="steps"
                )
                self.fields["guidance"] = gr.Slider(1, 20, value=defaults.guidance, step=0.1, label="Guidance")
            self.fields["negative"] = gr.Textbox(label="Negative prompt", elem_id="negative")
            with gr.Row():
                self.fields["seed"] = gr.Textbox(label="Seed", placeholder="empty: drawn anew", elem_id="seed")
                self.fields["sampler"] = gr.Dropdown(list(NAMES), value="ddim", label="Sampler", elem_id="sampler")
            with gr.Row():
                self.fields["width"] = gr.Slider(label="Width", elem_id="width", **size)
                self.fields["height"] = gr.Slider(label="Height", elem_id="height", **size)
            with gr.Row():
                self.fields["reuse"] = gr.Checkbox(
                    value=True,
                    label="Reuse the source",
                    info="Run once for several methods, and from the 2nd prompt on.",
                )
                self.fields["keep_maps"] = gr.Checkbox(
                    value=True, label="Keep attention maps", info="To see where each word looked."
                )

    def _add_results(self) -> None:
        with gr.Row(elem_id="buttons"):
            self.run = gr.Button("Run", variant="primary", min_width=120, elem_id="run")
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=120, elem_id="cancel")
        self.progress = gr.HTML(_said("Ready: press Run. Pictures appear here."), elem_id="progress")
        self.live = gr.HTML(elem_id="live", elem_classes="pictures")
        with gr.Column(visible=False) as self.results_part:
            self.notes = gr.HTML(elem_id="notes")
            self.gallery = gr.Gallery(
                label="Results",
                columns=3,
                object_fit="contain",
                height="auto",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="gallery",
            )
            self.files = gr.File(
                label="Files: each PNG but the sheet repeats its run (masa rerun FILE)",
                file_count="multiple",
                interactive=False,
                elem_id="files",
            )
            with gr.Accordion("Settings of this run", open=True):
                self.table = gr.HTML(elem_id="table")
            with gr.Accordion("Where each word looked", open=False, elem_id="attention_part"):
                self.words = gr.Radio([], label="Click a word", elem_id="words")
                self.attention = gr.HTML(elem_id="attention", elem_classes="pictures")
            with gr.Accordion("Masks that were used", open=False, visible=False) as self.masks_part:
                self.masks = gr.HTML(elem_id="masks", elem_classes="pictures")

    # ------------------------------------------------------------------------------------------------- events

    def _connect(self) -> None:
        kind, fields = self.kind, self.fields
        kind.change(_show_kind, kind, [self.picture_part, self.paint_source_part], **QUIET)
        self.moves.change(lambda moves: gr.update(visible=moves), self.moves, self.paint_target_part, **QUIET)
        fields["methods"].change(
            _show_parts, fields["methods"], [self.mask_part, self.p2p_part, self.pnp_part], **QUIET
        )
        fields["mask"].change(_show_mask_parts, fields["mask"], [self.word_part, self.paint_part], **QUIET)
        fields["adapter"].change(
            lambda name: gr.update(visible=name != NO_LAYOUT), fields["adapter"], self.drawing_part, **QUIET
        )
        fields["steps"].change(_limit_start, [fields["steps"], fields["start_step"]], fields["start_step"], **QUIET)
        size = [fields["width"], fields["height"]]
        shape = gr.State((0, 0))
        editor = fields["picture"]
        for event in (editor.upload, editor.input, editor.apply):
            event(self._fit_size, [editor, shape], [*size, shape], **QUIET)
        for button, editor in ((self.fetch_source, "mask_source"), (self.fetch_target, "mask_target")):
            button.click(self._fetch, [kind, fields["picture"], *size], [fields[editor], self.progress], **QUIET)
        inputs = [kind, self.moves, *fields.values()]
        told = [self.run, self.cancel, self.progress, self.live]
        outcome = [
            *(self.results_part, self.notes, self.gallery, self.files, self.table),
            *(self.words, self.attention, self.masks_part, self.masks),
        ]
        # The first answers at once, also where the second waits for another's run.
        self.run.click(self._wait, None, told, **QUIET).then(
            self._run,
            inputs,
            [*told, *outcome],
            **QUEUED,
        )
        self.cancel.click(self._cancel, None, None, **QUIET)
        self.show_mask.click(
            self._find_mask,
            inputs,
            [self.mask_shown, self.progress],
            **QUEUED,
        )
        fields["threshold"].input(self._mask_again, fields["threshold"], self.mask_shown, **QUIET)
        self.words.input(self._attention, self.words, self.attention, **QUIET)
        self.blocks.unload(self._close)

    def asked(self, kind: str, moves: bool, *values: Any) -> Asked:
        """What the page's controls say."""
        said = dict(zip(self.fields, values, strict=True))
        said["mask_source"] = painted_on(said["picture"] if kind == PICTURE else said["mask_source"])
        said["mask_target"] = painted_on(said["mask_target"]) if moves else None
        said["picture"] = picture_of(said["picture"]) if kind == PICTURE else None
        if kind == PICTURE and said["picture"] is None:
            raise MasaError("there is no picture yet; upload one")
        said["layout"] = drawing_of(said["layout"])
        for name in ("source", "negative", "word_source", "word_target"):
            said[name] = (said[name] or "").strip()
        for name in ("steps", "width", "height", "start_step", "start_layer"):
            said[name] = int(said[name])
        for name in ("guidance", "layout_weight"):
            said[name] = float(said[name])
        said["seed"] = _seed(said["seed"])
        said["methods"] = tuple(said["methods"])
        return Asked(**said)

    def _wait(self, request: gr.Request) -> dict[Any, Any]:
        self.desk.sessions.of(_tab(request)).wait()
        return self._busy(True) | {self.progress: _said("Waiting for its turn."), self.live: ""}

    def _run(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        session = self.desk.sessions.of(_tab(request))
        try:
            for told in runs.run(self.desk, session, self.asked(*values)):
                if isinstance(told, Progress):
                    yield {self.progress: _bar(told), self.live: figures(told.seen)}
                elif isinstance(told, Outcome):
                    yield self._busy(False) | self._shown(told)
        except Cancelled:
            yield self._busy(False) | {self.progress: _said("Cancelled; nothing was kept of it."), self.live: ""}
        except REFUSED as error:
            yield self._busy(False) | {self.progress: _refused(error), self.live: ""}
        finally:
            session.ticket = None

    def _busy(self, at_work: bool) -> dict[Any, Any]:
        return {self.run: gr.update(interactive=not at_work), self.cancel: gr.update(interactive=at_work)}

    def _shown(self, outcome: Outcome) -> dict[Any, Any]:
        masks = runs.masks_of(outcome)
        notes = "".join(f"<p role='status'>{escape(note)}</p>" for note in outcome.notes)
        return {
            self.progress: _said(f"Done in {outcome.seconds:.1f} s."),
            self.live: "",
            self.results_part: gr.update(visible=True),
            self.notes: notes,
            self.gallery: [(str(path), label) for path, label in outcome.shown],
            self.files: [str(path) for path in outcome.files],
            self.table: _table(runs.settings_of(outcome)),
            self.words: gr.update(choices=runs.words_of(outcome), value=None),
            self.attention: "",
            self.masks_part: gr.update(visible=bool(masks)),
            self.masks: figures(masks),
        }

    def _cancel(self, request: gr.Request) -> None:
        """The run itself says that it stops: an answer of this might come after its last word."""
        self.desk.sessions.of(_tab(request)).cancel()

    def _find_mask(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            for told in runs.find_mask(self.desk, self.desk.sessions.of(_tab(request)), self.asked(*values)):
                if isinstance(told, Progress):
                    yield {self.progress: _bar(told)}
                else:
                    yield {self.progress: _said("Ready."), self.mask_shown: figures([("the mask", told)])}
        except (Cancelled, *REFUSED) as error:
            yield {self.progress: _refused(error)}

    def _mask_again(self, request: gr.Request, threshold: float) -> Any:
        session = self.desk.sessions.of(_tab(request))
        return gr.skip() if session.found is None else figures([("the mask", runs.mask_again(session, threshold))])

    def _attention(self, request: gr.Request, word: str) -> str:
        outcome = self.desk.sessions.of(_tab(request)).outcome
        try:
            return "" if outcome is None else figures(runs.attention_of(self.desk.sd, outcome, word))
        except MasaError as error:
            return _refused(error)

    def _fetch(self, request: gr.Request, kind: str, edited: Any, width: int, height: int) -> tuple[Any, Any]:
        """The picture, or the last run's source, into a mask editor."""
        outcome = self.desk.sessions.of(_tab(request)).outcome
        picture = picture_of(edited) if kind == PICTURE else None
        if picture is not None:
            picture = Asked(picture=picture, width=int(width), height=int(height)).fitted
        elif kind == PROMPT and outcome is not None:
            picture = outcome.results[0][1].source.convert("RGB")
        if picture is None:
            missing = (
                "upload a picture first" if kind == PICTURE else "run once first: then there is a source to paint on"
            )
            return gr.skip(), _refused(MasaError(missing))
        value = {"background": enlarged(picture), "layers": [], "composite": None}
        return value, gr.skip()

    def _fit_size(self, edited: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
        """Width and height of a run in a picture's proportions, where it is another or was cropped."""
        picture = picture_of(edited)
        if picture is None or picture.size == tuple(shape):
            return gr.skip(), gr.skip(), gr.skip()
        height, width = target_size(picture.height, picture.width, self.desk.sd.config.image_size, None, None)
        return min(width, LARGEST), min(height, LARGEST), picture.size

    def _close(self, request: gr.Request) -> None:
        self.desk.sessions.close(_tab(request))


def build_page(desk: Desk) -> gr.Blocks:
    """The page, before it is served."""
    return Page(desk).blocks


def _seed(text: str | None) -> int | None:
    """A seed as typed; None for none."""
    text = (text or "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 15:
        raise MasaError(f"seed is {text!r}; expected a whole number, or nothing for one that is drawn")
    return int(text)


def _editor(
    label: str, colour: str, name: str, below: Image.Image | None = None, crop: bool = False, brush: int = 24
) -> gr.ImageEditor:
    """A canvas with one brush."""
    return gr.ImageEditor(
        value=None if below is None else {"background": below, "layers": [], "composite": None},
        type="pil",
        label=label,
        sources=["upload", "clipboard"],
        transforms=["crop"] if crop else [],
        brush=gr.Brush(default_size=brush, colors=[colour], default_color=colour, color_mode="fixed"),
        layers=False,
        format="png",
        height=380,
        elem_id=name,
    )


def _show_kind(kind: str) -> list[Any]:
    return [gr.update(visible=kind == PICTURE), gr.update(visible=kind == PROMPT)]


def _show_parts(methods: list[str]) -> list[Any]:
    return [gr.update(visible=name in methods) for name in (MASKED, P2P, PNP)]


def _limit_start(steps: float, start: float) -> Any:
    """The first controlled step stays within the run."""
    last = max(1, int(steps) - 1)
    return gr.update(maximum=last, value=min(int(start), last))


def _show_mask_parts(mask: str) -> list[Any]:
    return [gr.update(visible=mask == BY_WORD), gr.update(visible=mask == PAINTED)]


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)


# --------------------------------------------------------------------------------------------------------- HTML


def _header(desk: Desk) -> str:
    sd = desk.sd
    about = f"{sd.checkpoint}, {str(sd.dtype).removeprefix('torch.')} on {sd.device}"
    if sd.origin.checkpoint == "demo":
        about = (
            "Runs on the embedded demo model, which knows a small drawn world at 128x128 and no photographs; "
            "start with <code>masa app -c FILE</code> for Stable Diffusion v1."
        )
    else:
        about = f"Model: {escape(about)}."
    return f"<h1>masa</h1><p>The same subject, another pose. {about}</p>"


def _bar(progress: Progress) -> str:
    percent = round(100 * progress.share)
    left = "" if progress.seconds_left is None else f", {_time(progress.seconds_left)} left"
    return (
        f"<div class='bar' role='progressbar' aria-valuenow='{percent}' aria-valuemin='0' aria-valuemax='100'>"
        f"<div style='width: {percent}%'></div></div><p>{escape(progress.text)}{left}</p>"
    )


def _time(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"


def _said(text: str) -> str:
    return f"<p role='status'>{escape(text)}</p>"


def _refused(error: Exception) -> str:
    return f"<p role='alert'>{escape(str(error)) or type(error).__name__}</p>"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"
