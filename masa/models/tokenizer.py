"""CLIP's byte-pair tokenizer, and which tokens of a prompt belong to which of its words."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from torch import Tensor

from masa.errors import CheckpointError, MasaError

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's own word pattern: contractions, runs of letters, single digits, runs of anything else.
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# One phrase, one token position, or several of either.
Words = str | int | Sequence[str | int]


class Tokenizer:
    """Prompts -> token ids (n, 77): start, the prompt's tokens, end, padding.

    vocab: symbol -> id. merges: pairs in order of priority. pad_token: SD v1 pads with the end token.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], pad_token: str = END, length: int = 77
    ) -> None:
        for token in (START, END, pad_token):
            if token not in vocab:
                raise CheckpointError(
                    f"the vocabulary of {len(vocab)} tokens lacks {token!r}; give CLIP's tokenizer folder as tokenizer="
                )
        try:
            backend = TokenizerBackend(BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END))
        except Exception as error:  # the backend raises no narrower class
            raise CheckpointError(
                f"the vocabulary and the merges do not belong together ({error}); give a CLIP tokenizer's folder as "
                "tokenizer="
            ) from error
        backend.normalizer = NormalizerSequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
        backend.pre_tokenizer = PreTokenizerSequence(
            [
                Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
                ByteLevel(add_prefix_space=False),
            ]
        )
        # Written out in a prompt they are themselves, as in transformers.
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
        self._backend = backend
        self.vocab_size = max(vocab.values()) + 1
        self.length = length
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self.words: Mapping[str, tuple[int, ...]] = {}  # of textual inversion, each with its token ids
        self._names: list[tuple[re.Pattern[str], tuple[int, ...]]] = []

    @classmethod
    def clip(cls) -> Tokenizer:
        """The vocabulary of CLIP ViT-L/14, which ships with the library."""
        path = Path(str(files("masa.weights") / "clip" / "merges.txt"))
        merges = read_merges(path)
        bytes_ = list(byte_symbols().values())
        symbols = [*bytes_, *(b + "</w>" for b in bytes_), *(a + b for a, b in merges), START, END]
        return cls({symbol: i for i, symbol in enumerate(symbols)}, merges)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """A checkpoint's `tokenizer/` folder: vocab.json and merges.txt, or the one file tokenizer.json."""
        folder = Path(folder)
        settings = (
            _read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        )
        pad = settings.get("pad_token") or END
        pad = pad["content"] if isinstance(pad, dict) else pad
        whole = folder / "tokenizer.json"
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if not missing:
            return cls(_read_object(folder / "vocab.json"), read_merges(folder / "merges.txt"), pad)
        if not whole.is_file():
            raise CheckpointError(
                f"{folder} lacks {' and '.join(missing)}; expected a CLIP tokenizer's folder with these, or with "
                "tokenizer.json"
            )
        # transformers 5 writes this file alone. Merges are pairs, or in older files one string.
        model = _read_object(whole).get("model") or {}
        try:
            pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
            merges, vocab = [(first, second) for first, second in pairs], dict(model["vocab"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{whole} holds no byte-pair vocabulary; give a CLIP tokenizer's folder as tokenizer="
            ) from error
        return cls(vocab, merges, pad)

    def with_words(self, words: Mapping[str, tuple[int, ...]]) -> Tokenizer:
        """The same tokenizer where these words, and no others, have token ids of their own."""
        twin = copy.copy(self)
        twin.words = dict(words)
        longest_first = sorted(words, key=len, reverse=True)
        twin._names = [(re.compile(phrase_pattern(word), re.IGNORECASE), words[word]) for word in longest_first]
        return twin

    def encode(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of the bare prompt, untruncated, and each one's span of characters in it.

        It is split at known words first, the longest first; all ids of a word have the word's span.
        """
        if not self._names or not isinstance(prompt, str):
            return self._encode(prompt)
        found = self._find_names(prompt)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        ends = [0, *(end for _, end, _ in found)]
        for begin, (start, end, own) in zip(ends, [*found, (len(prompt), len(prompt), ())], strict=True):
            between, places = self._encode(prompt[begin:start])
            ids += [*between, *own]
            spans += [(first + begin, last + begin) for first, last in places]
            spans += [(start, end)] * len(own)
        return ids, spans

    def _find_names(self, prompt: str) -> list[tuple[int, int, tuple[int, ...]]]:
        """Where known words stand, in order, and their ids; none overlaps a longer one.

        They are looked for in composed characters, as `fold` has them, and told in the prompt's own.
        """
        text = unicodedata.normalize("NFC", prompt)
        found: list[tuple[int, int, tuple[int, ...]]] = []
        for pattern, ids in self._names:
            for start, end in (match.span() for match in pattern.finditer(text)):
                if all(end <= other_start or start >= other_end for other_start, other_end, _ in found):
                    found.append((start, end, ids))
        if text != prompt and found:
            ends = {unicodedata.normalize("NFC", prompt[:i]): i for i in range(len(prompt) + 1)}
            places = [(ends.get(text[:start]), ends.get(text[:end]), ids) for start, end, ids in found]
            # None: a word does not begin or end within a character of the prompt.
            found = [(start, end, ids) for start, end, ids in places if start is not None and end is not None]
        return sorted(found)

    def check_words(self, prompt: str) -> None:
        """MasaError where the limit of 77 tokens would cut a known word in half."""
        if not self._names:
            return
        ids, spans = self.encode(prompt)
        room = self.length - 2
        if len(ids) > room and ids[room] >= self.vocab_size and spans[room] == spans[room - 1]:
            start, end = spans[room]
            raise MasaError(
                f"{prompt[start:end]!r} stands for {spans.count(spans[room])} tokens, and only "
                f"{spans[:room].count(spans[room])} of them are among the first {room}, which are used; shorten the "
                "prompt or move the word forward"
            )

    def _encode(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = self._backend.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise MasaError(f"the prompt {prompt!r} is not text in Unicode; give a str without broken bytes") from error
        return encoding.ids, encoding.offsets

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (n, 77), int64. A prompt that is too long is cut, with a warning naming what went."""
        rows = []
        for prompt in prompts:
            self.check_words(prompt)
            ids, spans = self.encode(prompt)
            room = self.length - 2
            if len(ids) > room:
                dropped = prompt[spans[room][0] :]
                warnings.warn(f"the prompt has {len(ids)} tokens and {room} fit: left out {dropped!r}", stacklevel=2)
            ids = [self.start_id, *ids[:room], self.end_id]
            rows.append(ids + [self.pad_id] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64)

    def token_positions(self, prompt: str, words: Words) -> tuple[int, ...]:
        """Positions (0 is the start token) of the tokens of `words` in the prompt.

        A string is a word or a phrase, found wherever it stands as whole words, case aside; a number is a
        position itself. MasaError where a phrase is not in the prompt or a position is not in 0..76.
        """
        if isinstance(words, int | str):
            words = (words,)
        positions: set[int] = set()
        for word in words:
            if isinstance(word, int):
                if not 0 <= word < self.length:
                    raise MasaError(f"token position {word} is not in 0..{self.length - 1}")
                positions.add(word)
            else:
                positions.update(self._phrase_positions(prompt, word))
        if not positions:
            raise MasaError("no words were given to choose tokens by")
        return tuple(sorted(positions))

    def _phrase_positions(self, prompt: str, phrase: str) -> list[int]:
        text = fold(prompt)
        spans = [match.span() for match in re.finditer(phrase_pattern(phrase), text)] if phrase.split() else []
        if not spans:
            known = ", ".join(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", prompt))) or "none"
            raise MasaError(f"{phrase!r} is not in the prompt {prompt!r}; its words are: {known}")
        _, tokens = self.encode(text)
        positions = [
            i + 1
            for i, (start, end) in enumerate(tokens)
            if any(start < span_end and end > span_start for span_start, span_end in spans)
        ]
        room = self.length - 2
        kept = [position for position in positions if position <= room]
        if not kept:
            raise MasaError(
                f"{phrase!r} is token {positions[0]} of the prompt, of which only the first {room} are used; "
                "shorten the prompt or move the word forward"
            )
        return kept


def phrase_pattern(phrase: str) -> str:
    """Finds a phrase in a folded text, as whole words; where it begins or ends with punctuation it may touch one."""
    pattern = r"\s+".join(re.escape(part) for part in fold(phrase).split())
    pattern = (r"(?<!\w)" if re.match(r"\w", pattern) else "") + pattern
    return pattern + (r"(?!\w)" if re.search(r"\w$", pattern) else "")


def fold(text: str) -> str:
    """The text as the tokenizer sees it: composed characters in lower case.

    Letter by letter, as the tokenizer does; str.lower() alone treats a capital sigma by its neighbours.
    """
    return "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))


def byte_symbols() -> dict[int, str]:
    """The printable stand-in of every byte, in the vocabulary's order (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others follow, as characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return symbols


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of a merges file, in order; a first line starting with #version is skipped."""
    pairs = []
    try:
        # Not splitlines(): a few symbols of the vocabulary are line ends to Unicode.
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip() and not line.startswith("#version"):
                first, second = line.split()
                pairs.append((first, second))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a merges file: expected two symbols on line {len(pairs) + 1}; download it again"
        ) from error
    return pairs


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} and not an object; download it again")
    return found
