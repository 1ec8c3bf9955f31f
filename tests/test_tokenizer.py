"""Token ids equal transformers' on every kind of prompt; words are found where they stand."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest

import masa
from masa.models.tokenizer import END, START, Tokenizer, byte_symbols, fold, read_merges

PROMPTS = [
    "a photo of a cat",
    "",
    "   ",
    "A PHOTO OF A CAT",
    "it's they're we've I'd I'll I'm can't 'S",
    "3d render, 4k, f/1.4, 1999",
    "Ünïcödé café naïve",
    "cafe\u0301 e\u0323\u0307 \u1e9b\u0323",
    "猫が座っている 고양이 кошка γάτα قطة",
    "\U0001f408\u200d⬛ \U0001f3a8!!! :-) \U0001f1e9\U0001f1ea",
    "hello\tworld\n  x\r\n\u00a0y\u3000z",
    "ΣΊΣΥΦΟΣ Σ İstanbul ß ﬁ ſt Å K",
    "(cat:1.3), [dog], {fox} a_b-c/d\\e <lora:x:1>",
    "don’t “quote” — dash … ½ ² Ⅷ ٣",
    "\u200b zero \ufeff \x00\x07",
    "supercalifragilisticexpialidocious" * 3,
    "x" * 400,
    "word " * 100,
    "&amp; &lt;b&gt;",
    "a <|endoftext|> b<|startoftext|>c <|EndOfText|>",
]


def random_prompts(count: int) -> list[str]:
    """Strings of letters, digits, marks, symbols and rare characters."""
    draw = random.Random(0)
    ranges = [(32, 127), (32, 127), (0x80, 0x300), (0x300, 0x3000), (0xE000, 0x11000), (0x1F000, 0x1FB00)]
    return [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 30))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    from transformers import AddedToken, CLIPTokenizerFast

    folder = write_two_files(tmp_path_factory.mktemp("clip"))
    # As they are by default in transformers 5, and were not in 4, which then took <|EndOfText|> for the end too.
    start, end = (AddedToken(token, normalized=False, special=True) for token in (START, END))
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=77, **special)


def write_two_files(folder: Path) -> Path:
    """The shipped vocabulary as vocab.json and merges.txt, in a folder."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    text = "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges()) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return folder


def merges() -> list[tuple[str, str]]:
    return read_merges(Path(__file__).parent.parent / "weights" / "clip" / "merges.txt")


def vocabulary() -> dict[str, int]:
    """The 49,408 symbols: bytes, bytes that end a word, merges, start, end."""
    single = list(byte_symbols().values())
    symbols = [*single, *(s + "</w>" for s in single), *(a + b for a, b in merges()), START, END]
    return {symbol: i for i, symbol in enumerate(symbols)}


def test_the_published_ids_of_a_photo_of_a_cat(clip):
    ids = clip(["a photo of a cat"])
    assert ids.shape == (1, 77)
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 70
    assert clip.vocab_size == 49408


@pytest.mark.parametrize("prompts", [PROMPTS, random_prompts(500)], ids=["chosen", "random"])
def test_ids_equal_transformers(clip, oracle, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = clip(prompts).tolist()
    theirs = oracle(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    for prompt, mine, wanted in zip(prompts, ours, theirs, strict=True):
        assert mine == wanted, repr(prompt)


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_rest(clip):
    with pytest.warns(UserWarning, match=r"has 80 tokens and 75 fit: left out 'red red red red dog'"):
        ids = clip([" ".join(["red"] * 79 + ["dog"])])[0]
    assert ids[76] == clip.end_id
    assert ids[75] != clip.end_id


def test_a_prompt_of_exactly_75_tokens_is_whole(clip):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = clip([" ".join(["red"] * 75)])[0].tolist()
    assert ids.count(clip.end_id) == 1


@pytest.mark.parametrize(
    ("prompt", "words", "positions"),
    [
        ("a photo of a cat", "cat", (5,)),
        ("a photo of a cat", "a", (1, 4)),
        ("a photo of a cat", "photo of", (2, 3)),
        ("a photo of a cat", ("cat", "photo"), (2, 5)),
        ("a photo of a cat", 5, (5,)),
        ("a photo of a cat", (0, "cat", 76), (0, 5, 76)),
        ("A Photo Of A CAT", "cat", (5,)),
        ("a photo of a cat", " CAT ", (5,)),
        ("cat, cat and catfish", "cat", (1, 3)),
        ("a cat's tail", "cat", (2,)),
        ("a cat's tail", "cat's", (2, 3)),
        ("a black-and-white cat.", "white", (5 + 1,)),
        ("a (cat:1.3)!", "cat", (3,)),
        ("red  \n fox", "red fox", (1, 2)),
        ("the cat, asleep", ",", (3,)),
        ("the cat, asleep", "cat,", (2, 3)),
        ("cafe\u0301 noir", "café", (1,)),
        ("café noir", "cafe\u0301", (1,)),
        ("\U0001f408 and a cat", "cat", (5,)),
    ],
)
def test_token_positions(clip, prompt, words, positions):
    assert clip.token_positions(prompt, words) == positions


def test_a_word_of_several_tokens_has_them_all(clip):
    prompt = "a supercalifragilistic corgi"
    ids, _ = clip.encode(prompt)
    word, _ = clip.encode("supercalifragilistic")
    assert len(word) > 2
    assert clip.token_positions(prompt, "supercalifragilistic") == tuple(range(2, 2 + len(word)))
    assert clip.token_positions(prompt, "corgi") == (len(ids),)


def test_positions_are_those_of_the_prompts_own_tokens(clip):
    # Words are looked for in the folded prompt: it must have the same tokens.
    for prompt in [*PROMPTS[:-1], *random_prompts(500)]:
        assert clip.encode(fold(prompt))[0] == clip.encode(prompt)[0], repr(prompt)


@pytest.mark.parametrize("phrase", ["dog", "ca", "photo cat", "", "  "])
def test_a_phrase_that_is_not_there_is_refused_with_the_words_that_are(clip, phrase):
    with pytest.raises(masa.MasaError) as error:
        clip.token_positions("A photo, of a cat's tail", phrase)
    message = str(error.value)
    assert "\n" not in message
    assert repr(phrase) in message
    assert message.endswith("its words are: A, photo, of, a, cat's, tail")


def test_words_of_an_empty_prompt(clip):
    with pytest.raises(masa.MasaError, match="its words are: none"):
        clip.token_positions("", "cat")


def test_a_word_beyond_the_cut_is_said_to_be_cut(clip):
    prompt = "red " * 74 + "cat dog"
    assert clip.token_positions(prompt, "cat") == (75,)
    with pytest.raises(masa.MasaError, match=r"'dog' is token 76 .* only the first 75 are used; shorten"):
        clip.token_positions(prompt, "dog")


@pytest.mark.parametrize("words", [-1, 77, ()])
def test_positions_out_of_range_and_no_words_are_refused(clip, words):
    with pytest.raises(masa.MasaError):
        clip.token_positions("a cat", words)


def test_broken_bytes_are_refused(clip):
    with pytest.raises(masa.MasaError, match="not text in Unicode"):
        clip(["a \udcff cat"])


def test_a_folder_in_either_form_equals_the_shipped_vocabulary(clip, oracle, tmp_path):
    oracle.save_pretrained(tmp_path / "new")  # one tokenizer.json in transformers 5
    (tmp_path / "old").mkdir()
    write_two_files(tmp_path / "old")
    prompts = PROMPTS[:10]
    for folder in ("new", "old"):
        assert Tokenizer.from_folder(tmp_path / folder)(prompts).equal(clip(prompts)), folder


SMALL = {"vocab.json": {"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3, START: 4, END: 5, "!": 6}, "merges.txt": "a b</w>\n"}


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return folder


def test_a_small_vocabulary_with_its_own_padding(tmp_path):
    folder = write(tmp_path, SMALL | {"tokenizer_config.json": {"pad_token": {"content": "!"}}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer(["ab"])[0, :4].tolist() == [4, 3, 5, 6]
    assert tokenizer.vocab_size == 7


def test_tokenizer_json_has_its_own_padding_too(tmp_path):
    model = {"vocab": SMALL["vocab.json"], "merges": ["a b</w>"]}
    folder = write(tmp_path, {"tokenizer.json": {"model": model}, "tokenizer_config.json": {"pad_token": "!"}})
    assert Tokenizer.from_folder(folder)(["ab"])[0, :4].tolist() == [4, 3, 5, 6]
    assert Tokenizer.from_folder(write(folder, {"tokenizer_config.json": {}}))(["ab"])[0, :4].tolist() == [4, 3, 5, 5]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "lacks vocab.json and merges.txt; expected"),
        ({"vocab.json": SMALL["vocab.json"]}, "lacks merges.txt; expected"),
        (SMALL | {"vocab.json": "{"}, "vocab.json is not valid JSON .*; download it again"),
        (SMALL | {"vocab.json": "[]"}, "vocab.json holds a list and not an object; download"),
        (SMALL | {"vocab.json": "\udcff"}, "vocab.json is not valid JSON"),
        (SMALL | {"merges.txt": "a b c\n"}, "merges.txt is not a merges file: .* line 1; download"),
        (SMALL | {"merges.txt": "a z\n"}, "do not belong together .*; give"),
        (SMALL | {"vocab.json": {"a": 0}}, "lacks '<|startoftext|>'; give".replace("|", r"\|")),
        (SMALL | {"tokenizer_config.json": "nonsense"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.json": {"model": {"type": "Unigram"}}}, "tokenizer.json holds no byte-pair vocabulary; give"),
        ({"tokenizer.json": {"model": {"vocab": {}, "merges": ["a"]}}}, "tokenizer.json holds no byte-pair"),
    ],
)
def test_a_broken_tokenizer_folder_says_what_is_wrong(tmp_path, files, reason):
    with pytest.raises(masa.CheckpointError, match=reason) as error:
        Tokenizer.from_folder(write(tmp_path, files))
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)
