"""Inversions and picture edits from their papers' formulas, naively, on diffusers' UNet. Nothing here imports masa."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from published import Control, Oracle
from torch import Tensor


class InversionOracle(Oracle):
    """The loops as published: every row of both halves, per-step unconditional embeddings, recorded noise."""

    def predict(self, x: Tensor, t: int, uncond: Tensor, cond: Tensor, guidance: Sequence[float]) -> Tensor:
        """One guidance per branch."""
        with torch.no_grad():
            context = torch.cat([uncond.expand(len(x), -1, -1), cond])
            e_u, e_c = self.unet(torch.cat([x, x]), t, context).sample.chunk(2)
        return e_u + torch.tensor(guidance).reshape(-1, 1, 1, 1) * (e_c - e_u)

    def step(self, x: Tensor, e: Tensor, t: int, steps: int) -> Tensor:
        a, a_prev = self.alpha(t), self.alpha(t - 1000 // steps)
        return a_prev.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a_prev).sqrt() * e

    def ddpm(self, x: Tensor, e: Tensor, t: int, steps: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step with eta = 1."""
        a, a_prev = self.alpha(t), self.alpha(t - 1000 // steps)
        variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        return a_prev.sqrt() * x0 + (1 - a_prev - variance).sqrt() * e, variance.sqrt()

    def replay(
        self,
        x: Tensor,
        prompts: Sequence[str],
        steps: int,
        guidance: Sequence[float],
        unconds: Sequence[Tensor] | None = None,
        *,
        control: Control | None = None,
        skip: int = 0,
        noise: Sequence[Tensor] | None = None,
        pinned: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """From x at step `skip`; unconds and noise by step, noisiest first; pinned clean first."""
        self.hook(control or Control())
        with torch.no_grad():
            cond = torch.cat([self.context([p]) for p in prompts])
            empty = self.context([""])
        for i, t in list(enumerate(self.timesteps(steps)))[skip:]:
            if pinned is not None:
                x = torch.cat([pinned[steps - i], x[1:]])
            e = self.predict(x, t, empty if unconds is None else unconds[i], cond, guidance)
            if noise is None:
                x = self.step(x, e, t, steps)
            else:
                mean, sigma = self.ddpm(x, e, t, steps)
                x = mean + sigma * noise[i]
        return x

    def null_text(self, pivot: Sequence[Tensor], prompt: str, steps: int, guidance: float) -> list[Tensor]:
        """Null-text inversion, algorithm 1, with the published optimiser."""
        self.hook(Control())
        self.unet.requires_grad_(False)
        with torch.no_grad():
            cond, uncond = self.context([prompt]), self.context([""])
        x, found = pivot[-1], []
        for i, t in enumerate(self.timesteps(steps)):
            with torch.no_grad():
                e_c = self.unet(x, t, cond).sample
            uncond = uncond.detach().clone().requires_grad_(True)
            optimiser = torch.optim.Adam([uncond], lr=1e-2 * (1.0 - i / 100.0))
            for _ in range(10):
                e_u = self.unet(x, t, uncond).sample
                loss = F.mse_loss(self.step(x, e_u + guidance * (e_c - e_u), t, steps), pivot[steps - 1 - i])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if loss.item() < 1e-5 + 2e-5 * i:
                    break
            found.append(uncond.detach())
            x = self.step(x, self.predict(x, t, uncond.detach(), cond, [guidance]), t, steps)
        return found

    def edit_friendly(self, x0: Tensor, draws: Tensor, prompt: str, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        """x_t from independent draws (steps, 4, h, w), least noisy first; and z_t, noisiest first."""
        self.hook(Control())
        with torch.no_grad():
            cond = self.context([prompt])
            times = self.timesteps(steps)[::-1]
            xs = [x0]
            for t, draw in zip(times, draws, strict=True):
                xs.append(self.alpha(t).sqrt() * x0 + (1 - self.alpha(t)).sqrt() * draw[None])
            zs = []
            for k, t in enumerate(times):
                mean, sigma = self.ddpm(xs[k + 1], self.unet(xs[k + 1], t, cond).sample, t, steps)
                zs.append((xs[k] - mean) / sigma)
        return xs, zs[::-1]
