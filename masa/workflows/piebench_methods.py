"""The methods that PIE-Bench compares, with the settings that its published rows were made with (2310.01506)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from masa.controls.base import Control
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.errors import MasaError
from masa.workflows.piebench_layout import Entry

# Inverter -> `invert`'s method, and whether the source is put back on its trajectory at each step.
INVERTERS: Mapping[str, tuple[str, bool]] = {
    "ddim": ("ddim", False),
    "pinned": ("ddim", True),
    "negative-prompt": ("negative-prompt", False),
    "null-text": ("null-text", False),
    "edit-friendly": ("edit-friendly", True),  # its noise leads the source back all the same, for more rows
}
OTHER_NAMES = {"direct": "pinned"}
# They pull towards the source's prompt, so that there must be one, and leave no place for a negative prompt.
BY_PROMPT = ("negative-prompt", "null-text")

PNP_NEGATIVE = "ugly, blurry, black, low res, unrealistic"
SDEDIT_STRENGTH = 0.8

# (prompt, word) -> whether the word is in the prompt.
HasWord = Callable[[str, str], bool]


@dataclass(frozen=True)
class Plan:
    """What a method does with one edit: the source's prompt, its controls, the negative prompt."""

    source: str
    controls: tuple[Control, ...]
    negative_prompt: str = ""


def plan_masactrl(entry: Entry, inverter: str, has_word: HasWord) -> Plan:
    """Steps 4 on, layers 10 on, the source's prompt empty where the inversion allows it (2304.08465)."""
    return Plan(entry.source if inverter in BY_PROMPT else "", (MasaCtrl(),))


def plan_prompt_to_prompt(entry: Entry, inverter: str, has_word: HasWord) -> Plan:
    """Cross-attention for 0.4, self-attention for 0.6 of the steps, refined (2208.01626).

    The edited words blend locally and weigh twice, unless one of them is not in its prompt. With edit-friendly
    inversion words are swapped where the prompts have equally many, without blending and weights.
    """
    if inverter == "edit-friendly":
        equal = len(entry.source.split()) == len(entry.target.split())
        return Plan(entry.source, (PromptToPrompt("replace" if equal else "refine", {}, 0.4, 0.6),))
    words = entry.blended_words
    if words is None or not (has_word(entry.source, words[0]) and has_word(entry.target, words[1])):
        return Plan(entry.source, (PromptToPrompt("refine", {}, 0.4, 0.6),))
    blend = LocalBlend(words[0], words[1])
    return Plan(entry.source, (PromptToPrompt("refine", {words[1]: 2.0}, 0.4, 0.6, local_blend=blend),))


def plan_plug_and_play(entry: Entry, inverter: str, has_word: HasWord) -> Plan:
    """Features for 0.8, queries and keys for 0.5 of the steps; the source's prompt empty (2211.12572)."""
    if inverter in BY_PROMPT:
        return Plan(entry.source, (PlugAndPlay(),))
    return Plan("", (PlugAndPlay(),), PNP_NEGATIVE)


def plan_sdedit(entry: Entry, inverter: str, has_word: HasWord) -> Plan:
    """Noise to 0.8, then the target's prompt (2108.01073)."""
    return Plan("", ())


METHODS: Mapping[str, Callable[[Entry, str, HasWord], Plan]] = {
    "masactrl": plan_masactrl,
    "p2p": plan_prompt_to_prompt,
    "pnp": plan_plug_and_play,
    "sdedit": plan_sdedit,
}


def check_method(method: str, inverter: str | None, controls: Sequence[Control] | None) -> str:
    """The inverter's usual name; "noise" for SDEdit. MasaError for an unknown method or inverter, or one unused."""
    if method not in METHODS:
        raise MasaError(f"method is {method!r}; expected one of {', '.join(map(repr, METHODS))}")
    if method == "sdedit":
        if inverter is not None or controls is not None:
            what = f"inverter={inverter!r}" if inverter is not None else "controls"
            raise MasaError(f"{what} would do nothing: SDEdit neither inverts nor controls; leave it out")
        return "noise"
    name = OTHER_NAMES.get(inverter or "", inverter or "pinned")
    if name not in INVERTERS:
        raise MasaError(f"inverter is {inverter!r}; expected one of {', '.join(map(repr, INVERTERS))}")
    return name
