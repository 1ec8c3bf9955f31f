"""95% intervals of shares and means, and where two distributions cross."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of independent trials."""
    z, p = 1.959964, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(values: Sequence[float], clusters: Sequence[int]) -> tuple[float, float]:
    """Percentile bootstrap of a mean over whole clusters: cases of one individual share their source.

    values, clusters: of equal length, each value's cluster. The same resamples every time.
    """
    groups: dict[int, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    sums = np.array([sum(group) for group in groups.values()], dtype=float)
    sizes = np.array([len(group) for group in groups.values()], dtype=float)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def share_interval(hits: Sequence[bool], clusters: Sequence[int]) -> tuple[float, float]:
    """The wider, end by end, of Wilson's interval and the clustered bootstrap's.

    The bootstrap knows that cases share a source; Wilson's knows that 0 of n is not certainty.
    """
    a = wilson(sum(hits), len(hits))
    b = clustered([float(hit) for hit in hits], clusters)
    return min(a[0], b[0]), max(a[1], b[1])


def equal_error(same: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The threshold on an error at which as many of `same` are refused (>=) as of `other` accepted (<).

    Returns threshold, share of `same` refused, share of `other` accepted. Midway between neighbouring values; where
    a stretch of thresholds serves equally, the middle one.
    """
    a, b = np.sort(np.asarray(same, dtype=float)), np.sort(np.asarray(other, dtype=float))
    values = np.unique(np.concatenate([a, b]))
    if len(values) < 2:
        raise ValueError("equal_error needs two different values at least")
    at = (values[1:] + values[:-1]) / 2
    refused = 1 - np.searchsorted(a, at) / len(a)
    accepted = np.searchsorted(b, at) / len(b)
    gap = np.abs(refused - accepted)
    best = np.flatnonzero(np.isclose(gap, gap.min()))
    k = best[len(best) // 2]
    return float(at[k]), float(refused[k]), float(accepted[k])
