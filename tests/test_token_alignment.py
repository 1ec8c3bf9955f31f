"""Which tokens correspond to which, on words of one and of several tokens."""

from __future__ import annotations

import pytest
import torch
from published_p2p import refinement_mapper, replacement_mapper

import masa
from masa.controls.token_alignment import TokenizedPrompt, align, refinement_map, replacement_map
from masa.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def tokenize(tokenizer):
    return lambda prompt: TokenizedPrompt.of(prompt, tokenizer.encode)


def test_words_hold_all_their_tokens(tokenize):
    prompt = tokenize("a labradoodle siamese cat, isn't it? café 42")
    assert dict(prompt.words) == {
        "a": (1,),
        "labradoodle": (2, 3),
        "siamese": (4,),
        "cat,": (5, 6),
        "isn't": (7, 8),
        "it?": (9, 10),
        "café": (11,),
        "42": (12, 13),
    }
    assert len(prompt.ids) == 15


@pytest.mark.parametrize("words", ["naïve 猫 cat", "a 🐱 cat", "e\u0301te\u0301 d'or", "ÅNGSTRÖM  spaced\tout"])
def test_unicode_words_share_out_all_tokens(tokenize, tokenizer, words):
    prompt = tokenize(words)
    positions = [position for _, tokens in prompt.words for position in tokens]
    assert positions == list(range(1, len(tokenizer.encode(words)[0]) + 1))
    assert [word for word, _ in prompt.words] == words.split()


def test_long_prompts_are_cut(tokenize):
    prompt = tokenize("cat " * 80)
    assert len(prompt.ids) == 77
    assert prompt.words[74][1] == (75,)
    assert prompt.words[75][1] == ()
    assert torch.equal(replacement_map(prompt, prompt), torch.eye(77))
    assert torch.equal(refinement_map(prompt, prompt)[0], torch.eye(77))


SWAPS = [
    ("a photo of a cat", "a photo of a dog"),
    ("a siamese cat and a dog", "a labradoodle cat and a dog"),  # one token becomes two
    ("a labradoodle cat and a dog", "a siamese cat and a dog"),
    ("a labradoodle cat near a photorealistic house today", "a red cat near a postapocalyptic barn today"),
    ("a cat a cat", "a dog a cat"),  # repeated words
]


@pytest.mark.parametrize(("source", "target"), SWAPS)
def test_replacement_equals_the_published_walk(tokenizer, tokenize, source, target):
    out = replacement_map(tokenize(source), tokenize(target))
    assert torch.equal(out, replacement_mapper(tokenizer, source, target))


def test_words_of_other_lengths_move_what_follows(tokenize):
    matrix = replacement_map(tokenize("a siamese cat and a dog"), tokenize("a labradoodle cat and a dog"))
    # siamese (2) -> labra doodle (2, 3), half each; cat (3) -> (4); the published code maps (4) to (4).
    assert matrix[2, 2] == matrix[2, 3] == 0.5
    for position in range(3, 76):
        assert matrix[position].nonzero().tolist() == [[position + 1]]
        assert matrix[position, position + 1] == 1
    assert matrix[0, 0] == matrix[1, 1] == 1

    back = replacement_map(tokenize("a labradoodle cat and a dog"), tokenize("a siamese cat and a dog"))
    assert back[2, 2] == back[3, 2] == 1  # both parts of the word add up
    assert back[4, 3] == back[5, 4] == 1
    assert back[:, 76].sum() == 0  # the source has no padding left for it


def test_punctuation_belongs_to_its_word(tokenize):
    matrix = replacement_map(tokenize("a cat, sitting"), tokenize("a dog sitting"))
    assert matrix[2, 2] == matrix[3, 2] == 1
    assert matrix[4, 3] == 1


def test_unequal_word_counts_are_named(tokenize):
    with pytest.raises(masa.MasaError, match=r"has 2 words and 'a red cat' 3; .*edit='refine'"):
        replacement_map(tokenize("a cat"), tokenize("a red cat"))


ADDITIONS = [
    ("a photo of a cat", "a photo of a fluffy white cat"),
    ("a photo of a cat", "a watercolour of a cat in the snow, at night"),
    ("a cat on a mat", "a labradoodle cat on a mat"),
    ("a cat and a cat", "a cat and a cat and a cat"),
    ("", "a cat"),
    ("a dog", "a dog"),
    ("the very big dog", "the very big photorealistic postapocalyptic dog!"),
]


@pytest.mark.parametrize(("source", "target"), ADDITIONS)
def test_refinement_equals_the_published_alignment(tokenizer, tokenize, source, target):
    mapper, aligned = refinement_mapper(tokenizer, source, target)
    reference = torch.zeros(77, 77)
    for j in range(77):
        if aligned[j]:
            reference[mapper[j], j] = 1
    out, found = refinement_map(tokenize(source), tokenize(target))
    assert torch.equal(out, reference)
    assert torch.equal(found, aligned)


def test_new_tokens_are_left_out(tokenize):
    matrix, aligned = refinement_map(tokenize("a photo of a cat"), tokenize("a photo of a labradoodle cat"))
    assert (aligned == 0).nonzero().flatten().tolist() == [5, 6]
    assert matrix[5, 7] == 1
    assert torch.equal(matrix.sum(0), aligned)


def test_a_shorter_target_takes_no_word_for_its_padding(tokenize):
    matrix, aligned = refinement_map(tokenize("a photo of a cat"), tokenize("a cat"))
    assert matrix[6, 3] == 1  # end to end
    assert aligned[4:7].sum() == 0  # the source still has words there
    assert torch.equal(matrix[7:, 7:], torch.eye(70))


def test_only_equal_tokens_are_paired():
    assert align([1, 2, 3, 4], [1, 5, 3, 4]) == [(0, 0), (2, 2), (3, 3)]
    assert align([], [1]) == []


def test_of_equally_good_alignments_the_targets_end_is_left_out_first():
    """Then the source's: the published walk, from the end on."""
    assert align([1, 2], [2, 1]) == [(1, 0)]
    assert align([1, 1], [1]) == [(0, 0)]
    assert align([1], [1, 1]) == [(0, 0)]
    assert align([1, 2, 1, 2], [2, 1, 2, 1]) == [(1, 0), (2, 1), (3, 2)]
