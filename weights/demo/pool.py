"""Training pictures with their captions, rendered once by several processes."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .loop import layout
from .world import SUBJECTS, render, sample, turned

# Training draws seeds from here up; everything below is held out, for tests, judging and benchmarks.
FIRST_TRAINING_SEED = 10_000_000
_CHUNK = 100


@dataclass(frozen=True)
class Pool:
    """Pictures uint8 (n, 3, size, size), their captions, and the seeds that made them."""

    pictures: Tensor
    captions: list[str]
    seeds: range

    def __len__(self) -> int:
        return len(self.captions)


def as_input(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], as the device likes them to lie in memory."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=layout(pictures.device))


def as_pictures(decoded: Tensor) -> Tensor:
    """Floats in [-1, 1] (n, 3, h, w), clipped -> uint8 of the same shape."""
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def _render_chunk(seeds: range, size: int, subjects: tuple[str, ...], twins: bool) -> tuple[np.ndarray, list[str]]:
    pictures = np.empty((len(seeds), size, size, 3), np.uint8)
    captions = []
    for i, seed in enumerate(seeds):
        drawn = turned(sample(seed, subjects)) if twins else sample(seed, subjects)
        pictures[i] = render(drawn.appearance, drawn.pose, drawn.scene, size)[0]
        captions.append(drawn.caption)
    return pictures, captions


def render_pool(
    seeds: range, size: int, subjects: Sequence[str] = SUBJECTS, workers: int = 0, twins: bool = False
) -> Pool:
    """Renders the samples of `seeds`; `workers` 0 renders in this process. The result does not depend on it.

    `twins` renders each of them facing the other way instead.
    """
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    work = partial(_render_chunk, size=size, subjects=tuple(subjects), twins=twins)
    pictures = torch.empty(len(seeds), 3, size, size, dtype=torch.uint8)
    captions: list[str] = []
    with tqdm(total=len(seeds), desc="rendering", unit="img", disable=len(chunks) < 2) as bar:

        def keep(chunk: tuple[np.ndarray, list[str]]) -> None:
            drawn = torch.from_numpy(chunk[0]).permute(0, 3, 1, 2)
            pictures[len(captions) : len(captions) + len(drawn)] = drawn
            captions.extend(chunk[1])
            bar.update(len(drawn))

        if workers:
            with multiprocessing.get_context("spawn").Pool(workers) as processes:
                for chunk in processes.imap(work, chunks):
                    keep(chunk)
        else:
            for seeds_ in chunks:
                keep(work(seeds_))
    return Pool(pictures, captions, seeds)
