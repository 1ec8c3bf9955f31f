"""Names the subject, pose and direction of a picture: a small network trained on renders."""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .loop import SpareCores, autocast, learning_rate
from .pool import FIRST_TRAINING_SEED, render_pool
from .world import POSES, SUBJECTS, sample

CLASSES: tuple[tuple[str, str], ...] = tuple((s, p) for s in SUBJECTS for p in POSES[s])
WEIGHTS = Path(__file__).parent / "pose_classifier.safetensors"


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees, and how sure it is of the pair (0..1)."""

    subject: str
    pose: str
    facing: int  # 1 right, -1 left
    confidence: float


class PoseClassifier(nn.Module):
    """Pictures (n, 3, h, w) in [-1, 1] -> logits over CLASSES and over facing (left, right): (n, classes + 2).

    Pictures are brought to `size` first. At 64, with one level less, which way people look who stand is lost.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 48, 80, 112)) -> None:
        super().__init__()
        self.size = 4 * 2 ** len(widths)
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        # where things are is what tells poses apart: keep the 4x4 grid, do not average it away
        self.head = nn.Linear(widths[-1] * 16, len(CLASSES) + 2)

    def forward(self, pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return self.head(self.features(small).flatten(1))

    @torch.no_grad()
    def judge(self, pictures: Tensor, subject: str | None = None) -> list[Verdict]:
        """One verdict per picture; with `subject` given, the best pose of that subject."""
        logits = self(pictures)
        classes = logits[:, : len(CLASSES)].float()
        if subject is not None:
            other = torch.tensor([s != subject for s, _ in CLASSES], device=classes.device)
            classes = classes.masked_fill(other, -torch.inf)
        sure, best = classes.softmax(1).max(1)
        right = logits[:, -1] > logits[:, -2]
        return [
            Verdict(CLASSES[k][0], CLASSES[k][1], 1 if r else -1, p)
            for k, r, p in zip(best.tolist(), right.tolist(), sure.tolist(), strict=True)
        ]


def load_pose_classifier(path: Path = WEIGHTS) -> PoseClassifier:
    """The shipped classifier, or one of other widths, in evaluation mode."""
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    kernels = [tensor for name, tensor in state.items() if name.startswith("features.") and tensor.dim() == 4]
    model = PoseClassifier(tuple(sorted({len(kernel) for kernel in kernels})))  # each level is wider than the last
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def degrade(pictures: Tensor, draws: torch.Generator) -> Tensor:
    """What generated pictures suffer from, at random: blur, shifts of colour, noise, a coarse grid; in [-1, 1]."""
    n, _, h, w = pictures.shape
    coarse = (1.0, 0.5, 0.33, 0.2)[int(torch.randint(4, (), generator=draws))]
    out = pictures
    if coarse < 1:
        small = F.interpolate(out, scale_factor=coarse, mode="bilinear", antialias=True, align_corners=False)
        blurred = F.interpolate(small, (h, w), mode="bicubic", align_corners=False)
        out = torch.lerp(out, blurred, torch.rand(n, 1, 1, 1, generator=draws))
    gain = 1 + 0.25 * (torch.rand(n, 3, 1, 1, generator=draws) - 0.5)
    shift = 0.3 * (torch.rand(n, 3, 1, 1, generator=draws) - 0.5)
    blotches = F.interpolate(torch.randn(n, 3, 8, 8, generator=draws), (h, w), mode="bicubic", align_corners=False)
    amount = 0.15 * torch.rand(n, 1, 1, 1, generator=draws)
    grain = 0.05 * torch.rand(n, 1, 1, 1, generator=draws) * torch.randn(out.shape, generator=draws)
    return (out * gain + shift + amount * blotches + grain).clamp(-1, 1)


def labels(seeds: range) -> Tensor:
    """Class and facing (0 left, 1 right) of the samples of `seeds`: (n, 2)."""
    drawn = [sample(seed) for seed in seeds]
    return torch.tensor([[CLASSES.index((d.appearance.subject, d.pose)), (d.scene.facing + 1) // 2] for d in drawn])


@torch.no_grad()
def accuracy(model: PoseClassifier, pictures: Tensor, truth: Tensor, draws: torch.Generator | None = None) -> dict:
    """Shares of right subject-and-pose and of right facing on uint8 pictures, degraded if `draws` are given."""
    right = torch.zeros(2)
    for part, wanted in zip(pictures.split(100), truth.split(100), strict=True):
        x = part.float() / 127.5 - 1
        logits = model(degrade(x, draws) if draws else x)
        right[0] += (logits[:, : len(CLASSES)].argmax(1) == wanted[:, 0]).sum()
        right[1] += (logits[:, -2:].argmax(1) == wanted[:, 1]).sum()
    share = right / len(pictures)
    return {"pose": round(share[0].item(), 4), "facing": round(share[1].item(), 4)}


def main() -> None:
    """Trains the classifier and writes its weights and its accuracies."""
    parser = argparse.ArgumentParser(prog="python -m masa.weights.demo.pose_classifier", description=__doc__)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights; the card lies beside them (%(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    first = FIRST_TRAINING_SEED + 5_000_000
    seeds = range(first, first + args.pictures)
    model = PoseClassifier()
    side = model.size
    pictures = render_pool(seeds, side, workers=args.workers).pictures
    truth = labels(seeds)
    held_out = range(1000, 2000)
    check, check_truth = render_pool(held_out, side, workers=args.workers).pictures, labels(held_out)

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    draws, batch, spare = torch.Generator().manual_seed(0), 50, SpareCores(args.threads)
    total = args.epochs * args.pictures // batch
    for step in tqdm(range(total), desc="classifier", mininterval=10):
        spare()
        rows = torch.randint(len(pictures), (batch,), generator=draws)
        x, wanted = degrade(pictures[rows].float() / 127.5 - 1, draws), truth[rows]
        # shifts by some pixels: generated subjects are not always where rendered ones are
        far = side // 10
        dx, dy = (int(v) for v in torch.randint(2 * far + 1, (2,), generator=draws))
        x = F.pad(x, (far, far, far, far), mode="replicate")[:, :, dy : dy + side, dx : dx + side]
        mirrored = torch.rand(batch, generator=draws) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
        wanted = torch.stack([wanted[:, 0], torch.where(mirrored, 1 - wanted[:, 1], wanted[:, 1])], 1)
        with autocast(x.device):
            logits = model(x).float()
        loss = F.cross_entropy(logits[:, : len(CLASSES)], wanted[:, 0], label_smoothing=0.05)
        loss = loss + 0.5 * F.cross_entropy(logits[:, -2:], wanted[:, 1], label_smoothing=0.05)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(2e-3, step, step / total, 50, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, args.out)
    model = load_pose_classifier(args.out)
    card = {
        "held_out": accuracy(model, check, check_truth),
        "held_out_degraded": accuracy(model, check, check_truth, torch.Generator().manual_seed(1)),
        "held_out_pictures": len(check),
    }
    args.out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
