"""UniPC: a prediction of the next latents, corrected by the network's answer to it (2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from masa.errors import MasaError
from masa.samplers.base import History, Levels, Sampler, Solver
from masa.samplers.grids import End, Spacing, check_grid, half_log_snr, multistep_levels, refuse_own_levels
from masa.schedule import Schedule

ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC of B2(h) = e^h - 1, on predictions of the clean latents; for 5 to 12 steps.

    order: 1, 2 or 3, of the prediction; the correction's is one more. karras, spacing, end: the noise levels, as in
    `DPMSolverPP`; a trajectory brings its own. 2302.04867, section 3, in the form for data prediction.
    """

    order: int = 2
    karras: bool = False
    spacing: Spacing | None = None
    end: End | None = None

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in ORDERS:
            raise MasaError(f"UniPC order is {self.order!r}; expected one of {', '.join(map(str, ORDERS))}")
        check_grid("UniPC", karras=self.karras, spacing=self.spacing, end=self.end)

    def levels(self, schedule: Schedule, steps: int, fixed: Levels | None = None) -> Levels:
        if fixed is not None:
            refuse_own_levels("UniPC", karras=self.karras, spacing=self.spacing, end=self.end)
            return fixed
        return multistep_levels(schedule, steps, karras=self.karras, spacing=self.spacing, end=self.end)

    def start(self, levels: Levels, eta: float) -> Solver:
        return _Solver(levels, self.order)


@dataclass(frozen=True)
class _Solver(Solver):
    """Its history: the predictions m of the clean latents of up to `order` steps before, the latest first.

    The last x is not among them. The corrector differs from the predictor that x came from in its weights alone, so x
    is corrected by the difference: what a control or a callback has changed in x stays changed.
    """

    levels: Levels
    order: int
    keeps_history: bool = True

    def step(
        self, step: int, x: Tensor, eps: Tensor, x0: Tensor, history: History, noise: Tensor | None
    ) -> tuple[Tensor, History]:
        m = x0  # of the uncorrected x, to which the network answered
        x = self._correct(step, x, m, history)
        known = (m, *history)[: self.order]
        a, a_next = self.levels.alphas[step : step + 2]
        if a_next == 1.0:
            return m, known
        h = max(half_log_snr(a_next) - half_log_snr(a), 0.0)  # Karras may end where it is: at sigma_min
        r, weights = self._predictor(step, known)
        slope = _total(m, _differences(known, r), weights)
        return math.sqrt((1.0 - a_next) / (1.0 - a)) * x - math.sqrt(a_next) * math.expm1(-h) * slope, known

    def _predictor(self, step: int, known: History) -> tuple[list[float], list[float]]:
        """r_k = (lambda_{-k} - lambda) / h and rho_k, k < q, of the order q that a step predicts with."""
        q = min(self.order, self.levels.steps - step, len(known))
        if q == 1:
            return [], []
        lambdas = [half_log_snr(self.levels.alphas[i]) for i in range(step - q + 1, step + 2)]
        h = lambdas[-1] - lambdas[-2]
        r = [(before - lambdas[-2]) / h for before in lambdas[-3::-1]]
        return r, [0.5] if q == 2 else _weights(h, r)  # simplified as published: 2M's

    def _correct(self, step: int, x: Tensor, m: Tensor, history: History) -> Tensor:
        """x with the answer m to it taken in: the corrector's step less the predictor's, which x came from."""
        if not history:
            return x
        a_before, a = self.levels.alphas[step - 1 : step + 1]
        h = half_log_snr(a) - half_log_snr(a_before)
        r, predicted = self._predictor(step - 1, history)
        weights = _weights(h, [*r, 1.0]) if r else [0.5]
        more = [new - old for new, old in zip(weights, predicted, strict=False)]
        change = _total(weights[-1] * (m - history[0]), _differences(history, r), more)
        return x - math.sqrt(a) * math.expm1(-h) * change


def _differences(known: History, r: Sequence[float]) -> list[Tensor]:
    """D_k = (m_{-k} - m) / r_k."""
    return [(before - known[0]) / r_k for before, r_k in zip(known[1:], r, strict=False)]


def _total(first: Tensor, differences: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    for weight, difference in zip(weights, differences, strict=False):
        first = first + weight * difference
    return first


def _weights(h: float, r: Sequence[float]) -> list[float]:
    """rho of sum_k r_k^(j-1) rho_k = b_j, j = 1..q, with b_j = j! g_j / B(h)."""
    phi = math.expm1(-h)
    g, b = -phi / h - 1.0, []
    for j in range(1, len(r) + 1):
        b.append(math.factorial(j) * g / phi)
        g = -g / h - 1.0 / math.factorial(j + 1)
    return [float(rho) for rho in np.linalg.solve(np.vander(r, increasing=True).T, b)]
