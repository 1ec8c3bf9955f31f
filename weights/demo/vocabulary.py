"""A CLIP tokenizer over the words of the world's captions."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from masa.models.tokenizer import END, START, byte_symbols

from .world import WORDS

LENGTH = 77


def byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first, that make every one of the words a single token."""
    symbols = byte_symbols()
    split = {}
    for word in words:
        letters = [symbols[byte] for byte in word.encode()]
        split[word] = [*letters[:-1], letters[-1] + "</w>"]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in split.values() for pair in pairwise(parts))
        if not pairs:
            return merges
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for word, parts in split.items():
            split[word] = _merge(parts, best)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Writes vocab.json, merges.txt and the two settings files that CLIPTokenizer reads; returns the size.

    Bytes come first, then merges, then the start and end tokens, as in CLIP's own vocabulary; words outside
    it fall apart into letters rather than becoming unknown.
    """
    letters = list(byte_symbols().values())
    merges = byte_pair_merges(words)
    entries = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    assert len(set(entries)) == len(entries)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(entries)
