"""How far an edited picture is from its truth: pose, the subject's appearance, the background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter
from skimage.metrics import structural_similarity

from masa.weights.demo.pose_classifier import PoseClassifier
from masa.weights.demo.world import Pose, render, sample

from .cases import Individual

BLUR = 1 / 40  # of the picture's side: the appearance error forgives shifts of about that much
USUAL_SEEDS = range(500_000, 500_060)


@dataclass(frozen=True)
class Measures:
    """One edit. Errors are mean absolute differences of 255; psnr (dB) and ssim are inside the true subject.

    facing: whether the subject is seen to face where the prompt says. appearance_as_seen: the appearance error
    against the truth that faces where the edit is seen to face, so that a subject of the right looks that faces
    the other way is not taken for another. All else is against the truth as captioned.
    Of a synthesised pair there is no truth: psnr and ssim are NaN, and its errors are against its own source.
    """

    pose: bool
    facing: bool
    appearance: float
    appearance_as_seen: float
    background: float
    psnr: float = math.nan
    ssim: float = math.nan


def judge(classifier: PoseClassifier, picture: np.ndarray, subject: str) -> tuple[str, int]:
    """The pose that a picture (h, w, 3) shows, and where its subject faces: 1 right, -1 left."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    verdict = classifier.judge(x, subject)[0]
    return verdict.pose, verdict.facing


def appearance_error(picture: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute difference inside the mask of local mean colours, of 255; colours outside have no say.

    Local: a Gaussian of BLUR of the side. So the right colours must be at about the right places of the body, but
    an edge that is a pixel off, or a stripe that is blurred, counts little.
    """
    sigma = BLUR * mask.shape[0]
    inside = mask.astype(np.float32)
    weight = gaussian_filter(inside, sigma)[mask]
    # One filter serves: a blur is linear.
    difference = (picture.astype(np.float32) - truth) * inside[..., None]
    local = gaussian_filter(difference, (sigma, sigma, 0))[mask]
    return float((np.abs(local) / weight[:, None]).mean())


def palette_distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far one set of pixels (n, 3) must move to look like another (m, 3), of 255, wherever they are.

    The mean over channels of the one-dimensional Wasserstein distance.
    """
    at = (np.arange(101) + 0.5) / 101
    return float(np.abs(np.quantile(a, at, axis=0) - np.quantile(b, at, axis=0)).mean())


def psnr(picture: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, inside a mask where one is given; at most 100."""
    error = np.square(picture.astype(np.float32) - truth)
    mean = error.mean() if mask is None else error[mask].mean()
    return 10 * math.log10(255**2 / max(float(mean), 255**2 * 1e-10))


def against_truth(classifier: PoseClassifier, who: Individual, pose: Pose, picture: np.ndarray) -> Measures:
    """Compares an edit of the rendered source with the rendered target."""
    size = picture.shape[0]
    truth, inside = who.picture(pose, size), who.mask(pose, size)
    # Smooth edges of the subject reach a little out of its mask.
    outside = ~binary_dilation(inside | who.mask(who.source_pose, size), iterations=3)
    a, b = picture.astype(np.float32), truth.astype(np.float32)
    _, similarity = structural_similarity(a, b, channel_axis=2, data_range=255, full=True)
    shown, facing = judge(classifier, picture, who.appearance.subject)
    seen = who.turned(facing)
    return Measures(
        pose=shown == pose,
        facing=facing == who.scene.facing,
        appearance=appearance_error(picture, truth, inside),
        appearance_as_seen=appearance_error(picture, seen.picture(pose, size), seen.mask(pose, size)),
        background=float(np.abs(a - b)[outside].mean()),
        psnr=psnr(picture, truth, inside),
        ssim=float(similarity[inside].mean()),
    )


def against_source(
    classifier: PoseClassifier, who: Individual, pose: str, source: np.ndarray, picture: np.ndarray
) -> Measures:
    """Compares a synthesised pair: colours are read where such subjects usually are, wherever they sit there."""
    size = picture.shape[0]
    subject, facing = who.appearance.subject, who.scene.facing
    before, after = (usual_regions(subject, p, facing, size) for p in (who.source_pose, pose))
    outside = before[1] & after[1]
    _, source_seen = judge(classifier, source, subject)
    shown, seen = judge(classifier, picture, subject)
    body, edited = (usual_regions(subject, *p, size)[0] for p in ((who.source_pose, source_seen), (pose, seen)))
    return Measures(
        pose=shown == pose,
        facing=seen == facing,
        appearance=palette_distance(source[before[0]], picture[after[0]]),
        appearance_as_seen=palette_distance(source[body], picture[edited]),
        background=float(np.abs(source.astype(np.float32) - picture)[outside].mean()),
    )


@cache
def usual_regions(subject: str, pose: str, facing: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that nearly always are the subject's, and those that nearly never are, over renders of one pose."""
    drawn = [sample(seed, [subject]) for seed in USUAL_SEEDS]
    masks = [render(d.appearance, pose, d.scene, size)[1] for d in drawn if d.scene.facing == facing]
    share = np.mean(masks, axis=0)
    return binary_erosion(share > 0.85, border_value=1), share < 0.03
