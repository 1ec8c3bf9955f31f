"""The captioned world: deterministic, exact truths, captions inside the vocabulary."""

from dataclasses import replace

import numpy as np
import pytest

from masa.models.tokenizer import Tokenizer
from masa.weights.demo.figures import COLOURS, JOINTED
from masa.weights.demo.scenery import draw_scene
from masa.weights.demo.stick_figure import stick_figure
from masa.weights.demo.vocabulary import write_tokenizer
from masa.weights.demo.world import POSES, SUBJECTS, WORDS, Between, caption, render, sample, turned


def grown(mask, by):
    """The mask and everything within `by` pixels of it."""
    for _ in range(by):
        mask = np.pad(mask, 1)
        mask = np.logical_or.reduce([mask[i : i + 128, j : j + 128] for i in range(3) for j in range(3)])
    return mask


def test_same_seed_gives_the_same_sample_and_pixels():
    first, second = sample(7), sample(7)
    assert first == second
    a = render(first.appearance, first.pose, first.scene)
    b = render(second.appearance, second.pose, second.scene)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0].shape == (128, 128, 3)
    assert a[0].dtype == np.uint8
    assert a[1].shape == (128, 128)
    assert a[1].dtype == bool


def test_different_seeds_give_different_individuals():
    assert len({sample(seed).appearance for seed in range(50)}) == 50


@pytest.mark.parametrize("subject", SUBJECTS)
def test_mask_covers_what_the_subject_changed_and_nothing_else(subject):
    drawn = sample(11, [subject])
    empty = np.asarray(draw_scene(drawn.scene, 128).resize((128, 128), 2)).astype(int)
    for pose in POSES[subject]:
        picture, mask = render(drawn.appearance, pose, drawn.scene)
        changed = np.abs(picture.astype(int) - empty).max(-1) > 0
        assert 0.04 < mask.mean() < 0.5
        assert (mask & ~changed).mean() < 0.002  # a subject pixel may happen to have the background's colour
        # the antialiased rim lies half outside
        assert not (changed & ~grown(mask, 2)).any()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_truth_of_an_edit_differs_only_where_either_pose_is(subject):
    drawn = sample(5, [subject])
    poses = POSES[subject]
    source, source_mask = render(drawn.appearance, poses[0], drawn.scene)
    for pose in poses[1:]:
        target, target_mask = render(drawn.appearance, pose, drawn.scene)
        differs = (source != target).any(-1)
        assert differs.any()
        assert not (differs & ~grown(source_mask | target_mask, 2)).any()


def test_poses_of_one_individual_are_told_apart_by_their_masks():
    for subject in SUBJECTS:
        drawn = sample(3, [subject])
        masks = [render(drawn.appearance, pose, drawn.scene)[1] for pose in POSES[subject]]
        for i, a in enumerate(masks):
            for b in masks[i + 1 :]:
                assert (a & b).sum() / (a | b).sum() < 0.9


def test_larger_picture_is_the_same_picture():
    drawn = sample(21)
    small, mask = render(drawn.appearance, drawn.pose, drawn.scene, 128)
    large, large_mask = render(drawn.appearance, drawn.pose, drawn.scene, 256)
    reduced = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 2.0
    assert abs(large_mask.mean() - mask.mean()) < 0.005


def test_facing_left_mirrors_the_subject():
    from dataclasses import replace

    drawn = sample(4, ["cat"])
    scene = replace(drawn.scene, x=0.5, facing=1)
    right = render(drawn.appearance, "standing", scene)[1]
    left = render(drawn.appearance, "standing", replace(scene, facing=-1))[1]
    assert (right != left[:, ::-1]).mean() < 0.01


def test_turned_sample_differs_in_direction_alone():
    for seed in range(20):
        one = sample(seed)
        other = turned(one)
        assert turned(other) == one
        assert (other.appearance, other.pose) == (one.appearance, one.pose)
        assert other.scene == replace(one.scene, facing=-one.scene.facing)
        names_the_way = "facing" in one.caption
        assert (other.caption != one.caption) == names_the_way
        assert other.caption.endswith("left" if other.scene.facing < 0 else "right") or not names_the_way


def test_unknown_pose_names_the_known_ones():
    drawn = sample(0, ["cat"])
    with pytest.raises(ValueError, match=r"no pose 'flying'.*sitting"):
        render(drawn.appearance, "flying", drawn.scene)


def test_caption_says_what_it_is_asked_to():
    drawn = sample(2, ["cat"])
    full = caption(drawn.appearance, "sitting", drawn.scene)
    assert full.startswith("a photo of a")
    assert drawn.appearance.colour in full
    assert ("facing right" if drawn.scene.facing == 1 else "facing left") in full
    bare = caption(drawn.appearance, "sitting", drawn.scene, opening="", colour=False, pattern=False, place=False,
                   facing=False)  # fmt: skip
    assert bare == "a cat sitting"
    first = caption(drawn.appearance, "sitting", drawn.scene, opening="", colour=False, pattern=False, place=False,
                    facing=False, pose_first=True)  # fmt: skip
    assert first == "a sitting cat"


def test_captions_vary_in_what_they_leave_out():
    captions = [sample(seed).caption for seed in range(300)]
    for part, low, high in (("facing", 0.6, 0.9), ("a photo of", 0.2, 0.45), ("in a room", 0.03, 0.2)):
        assert low < sum(part in text for text in captions) / len(captions) < high
    assert sum(any(colour in text for colour in COLOURS) for text in captions) / len(captions) > 0.4


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def test_every_word_of_every_caption_is_one_token(tokenizer_folder):
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    for word in WORDS:
        assert len(tokenizer.encode(word)[0]) == 1, word
    for seed in range(300):
        text = sample(seed).caption
        ids, _ = tokenizer.encode(text)
        assert len(ids) == len(text.replace(",", " ,").split())
        assert tokenizer.end_id not in ids


def test_vocabulary_loads_with_transformers_and_pads_with_the_end_token(tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    ours = Tokenizer.from_folder(tokenizer_folder)
    prompts = ["a photo of an orange striped cat sitting, facing left", "", "a zebra in pyjamas"]
    ids = theirs(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    assert ids == ours(prompts).tolist()
    assert ids[1] == [ours.start_id] + [ours.end_id] * 76


@pytest.mark.parametrize("subject", JOINTED)
def test_between_two_poses_lie_further_ones(subject):
    drawn = sample(9, [subject])

    def mask(pose):
        return render(drawn.appearance, pose, drawn.scene)[1]

    for first in POSES[subject]:
        for second in POSES[subject]:
            for amount, end in ((0.0, first), (1.0, second)):
                pose = Between(first, second, amount)
                for exact, one in (
                    (render(drawn.appearance, end, drawn.scene)[0], render(drawn.appearance, pose, drawn.scene)[0]),
                    (stick_figure(subject, end, drawn.scene), stick_figure(subject, pose, drawn.scene)),
                ):
                    # a + (b - a) may differ from b by a rounding, and so by a pixel of the large picture
                    assert np.abs(exact.astype(int) - one).mean() < 0.02
            if first != second:
                half = mask(Between(first, second, 0.5))
                apart = (mask(first) ^ mask(second)).mean()
                assert 0 < (half ^ mask(first)).mean() < 1.1 * apart
                assert 0 < (half ^ mask(second)).mean() < 1.1 * apart


def test_what_nothing_lies_between_is_refused():
    drawn = sample(0, ["bird"])
    with pytest.raises(ValueError, match="nothing lies between 'standing' and 'flying'"):
        render(drawn.appearance, Between("standing", "flying", 0.5), drawn.scene)
    with pytest.raises(ValueError, match=r"amount is 1.5; expected 0"):
        Between("standing", "sitting", 1.5)
    with pytest.raises(ValueError, match="has no pose 'swimming'"):
        render(drawn.appearance, Between("standing", "swimming", 0.5), drawn.scene)
