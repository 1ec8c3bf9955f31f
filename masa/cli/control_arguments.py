"""Controls on the command line: their arguments, and the values that these describe."""

from __future__ import annotations

import argparse
from typing import Any

from masa.cli.adapter_arguments import add_adapters, build_adapters, given
from masa.cli.registered_arguments import check_used, make, with_fields
from masa.controls.base import Control
from masa.controls.blended import BlendedLatents
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.controls.style import StyleTransfer
from masa.errors import MasaError
from masa.io.pictures import open_picture
from masa.settings import registered

CONTROLS = ("masactrl", "prompt-to-prompt", "plug-and-play", "style")


def add_start(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start-step", type=int, help="first step controlled (default: 4)")
    group.add_argument("--start-layer", type=int, help="first layer controlled, 0..15 (default: 10)")


def add_control(parser: argparse.ArgumentParser, frames: bool = False) -> None:
    """frames: of a video."""
    group = parser.add_argument_group("control (MasaCtrl)")
    add_start(group)
    group.add_argument("--control-steps", type=parse_numbers, metavar="LIST", help="these steps instead: 4,6,10-20")
    group.add_argument("--control-layers", type=parse_numbers, metavar="LIST", help="these layers instead: 10-15")
    group.add_argument(
        "--words", nargs=2, metavar=("SOURCE", "TARGET"), help="mask by these words' attention; a number is a token"
    )
    group.add_argument("--threshold", type=float, help="of the maps of --words (default: 0.1)")
    group.add_argument("--masks", nargs=2, metavar=("SOURCE", "TARGET"), help="mask by these pictures, white = subject")
    group.add_argument("--union", action="store_true", help="targets see their own keys and values too")
    group.add_argument("--source-weight", type=float, help="of the source in a --union (default: 1)")

    group = parser.add_argument_group("which controls, and those beside MasaCtrl")
    form = f"some of {', '.join(CONTROLS)}, or registered classes' names (default: masactrl)"
    either = group.add_mutually_exclusive_group()
    either.add_argument("--control", type=parse_controls, metavar="LIST", help=form)
    text = "none of them: the fixed-seed baseline"
    either.add_argument("--no-control", dest="control", action="store_const", const=[], help=text)
    edits = ("replace", "refine", "none")
    group.add_argument("--p2p-edit", choices=edits, help="swap words, add words, or only reweight (default: replace)")
    group.add_argument("--reweight", type=parse_factors, metavar="WORD=FACTOR,..", help="attention to target words")
    group.add_argument("--cross-steps", type=float, help="share of prompt-to-prompt's cross-attention (default: 0.8)")
    group.add_argument("--self-steps", type=float, help="share of prompt-to-prompt's self-attention (default: 0.4)")
    group.add_argument("--feature-steps", type=float, help="share of plug-and-play's features (default: 0.8)")
    group.add_argument("--attention-steps", type=float, help="share of plug-and-play's attention (default: 0.5)")
    text = "keep the source outside these words' attention"
    group.add_argument("--local-blend", nargs=2, metavar=("SOURCE", "TARGET"), help=text)
    group.add_argument("--blend", metavar="MASK", help="keep a real picture outside this mask, white = may change")
    add_adapters(parser, frames)


def add_record(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("looking inside (masa plot draws it)")
    group.add_argument("--record-words", type=parse_words, metavar="WORD,..", help="where these words look")
    group.add_argument("--record-self", action="store_true", help="self-attention")
    group.add_argument("--record-queries", action="store_true", help="queries of self-attention")
    group.add_argument("--record-x0", action="store_true", help="the clean pictures that steps predict")
    text = "of words, self-attention and queries (default: each its own)"
    group.add_argument("--record-layers", type=parse_numbers, metavar="LIST", help=text)
    text = "of queries and predictions (default: six)"
    group.add_argument("--record-steps", type=parse_numbers, metavar="LIST", help=text)


def build_controls(args: argparse.Namespace) -> list[Control]:
    """The controls that the options describe: MasaCtrl unless others are named, adapters, blending, recorders.

    What is not given is as in Python.
    """
    names = (["masactrl"] if args.target else []) if args.control is None else args.control
    where = given(
        start_step=args.start_step, start_layer=args.start_layer, steps=args.control_steps, layers=args.control_layers
    )
    controls: list[Control] = []
    if "masactrl" in names:
        weight = given(source_weight=args.source_weight)
        controls.append(MasaCtrl(**where, mask=build_mask(args), union=args.union, **weight))
    if "prompt-to-prompt" in names:
        edit: dict[str, Any] = (
            {} if args.p2p_edit is None else {"edit": None if args.p2p_edit == "none" else args.p2p_edit}
        )
        shares = given(cross_replace_steps=args.cross_steps, self_replace_steps=args.self_steps)
        controls.append(PromptToPrompt(**edit, **given(reweight=args.reweight), **shares))
    if "plug-and-play" in names:
        shares = given(feature_steps=args.feature_steps, attention_steps=args.attention_steps)
        controls.append(PlugAndPlay(**shares))
    if "style" in names:
        controls.append(StyleTransfer(**where))
    controls += [make(name, args.set) for name in names if name not in CONTROLS]
    controls += build_adapters(args)
    if args.local_blend is not None:
        controls.append(LocalBlend(as_words(args.local_blend[0]), as_words(args.local_blend[1])))
    if args.blend is not None:
        check_picture(args.blend)
        controls.append(BlendedLatents(args.blend))
    recorders = build_recorders(args) if "record_words" in args else []
    return [with_fields(control, args.set) for control in (*controls, *recorders)]


def build_start(args: argparse.Namespace) -> MasaCtrl:
    """MasaCtrl of a grid."""
    return MasaCtrl(**given(start_step=args.start_step, start_layer=args.start_layer))


def build_swept(args: argparse.Namespace) -> Control:
    """The control of a sweep."""
    control: Control = build_start(args) if args.control == "MasaCtrl" else make(args.control, args.set)
    check_used(args.set, [control])
    return with_fields(control, args.set)


def build_mask(args: argparse.Namespace) -> GivenMasks | WordMasks | None:
    """MasaCtrl's mask."""
    if args.words and args.masks:
        raise MasaError("--words and --masks both say where the subject is; give one")
    if args.words:
        return WordMasks(as_words(args.words[0]), as_words(args.words[1]), **given(threshold=args.threshold))
    if args.masks:
        for path in args.masks:
            check_picture(path)
        return GivenMasks(args.masks[0], args.masks[1])
    return None


def build_recorders(args: argparse.Namespace) -> list[Control]:
    """What the run is to keep for masa plot."""
    maps, layers, steps = args.record_words or args.record_self, args.record_layers, args.record_steps
    if layers is not None and not (maps or args.record_queries):
        raise MasaError("--record-layers says where to record; add --record-words, --record-self or --record-queries")
    if steps is not None and not (args.record_queries or args.record_x0):
        raise MasaError("--record-steps says when to record; add --record-queries or --record-x0")
    recorders: list[Control] = []
    if maps:
        recorders.append(RecordAttention(layers, args.record_words or (), args.record_self))
    if args.record_queries:
        recorders.append(RecordQueries(layers, steps))
    if args.record_x0:
        recorders.append(RecordPredictions(steps))
    return recorders


def as_words(text: str) -> str | int:
    """A word or phrase, or the token position that a number means."""
    return int(text) if text.isdecimal() else text


def check_picture(path: str) -> None:
    """Open a picture before the model's minutes are spent."""
    open_picture(path)


def parse_numbers(text: str) -> list[int]:
    """ "3,5,10-12" -> [3, 5, 10, 11, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,5,10-12") from None
        if not found:
            raise argparse.ArgumentTypeError(f"{part.strip()} runs backwards and holds no number; give {last}-{first}")
        numbers += found
    return numbers


def parse_words(text: str) -> list[str]:
    """ "cat, wooden chair" -> ["cat", "wooden chair"]."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty place; give words between the commas")
    return words


def parse_controls(text: str) -> list[str]:
    """ "masactrl,style" -> ["masactrl", "style"]."""
    names = parse_words(text)
    known = (*CONTROLS, *registered("begin"))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a control twice; name each once")
    return names


def parse_factors(text: str) -> dict[str, float]:
    """ "fluffy=4,cat=0.5" -> {"fluffy": 4.0, "cat": 0.5}."""
    pairs = [part.partition("=")[::2] for part in parse_words(text)]
    try:
        factors = {word.strip(): float(factor) for word, factor in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of WORD=FACTOR such as fluffy=4") from None
    if len(factors) < len(pairs) or "" in factors:
        raise argparse.ArgumentTypeError(f"{text!r} has a word twice, or none; give each word one factor")
    return factors
