"""Made folders in PIE-Bench's layout, networks with random weights, and the published arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


def picture(seed: int, side: int = 512, coarse: int = 16) -> np.ndarray:
    """A smooth random picture, uint8 (side, side, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC))


def changed(source: np.ndarray, seed: int, noise: float = 12.0) -> np.ndarray:
    """Another picture near it: noise everywhere, one rectangle replaced."""
    side = len(source)
    near = source + np.random.default_rng(seed).normal(0.0, noise, source.shape)
    near[side // 4 : side // 2, side // 4 : side // 2] = picture(seed + 1, side)[: side // 4, : side // 4]
    return near.clip(0, 255).round().astype(np.uint8)


def rectangle(side: int, top: int, left: int, height: int, width: int) -> list[int]:
    """A rectangle as runs: pairs (start, length) row by row."""
    return [number for row in range(top, top + height) for number in (row * side + left, width)]


# The source's and the target's prompt, type, blended words.
EDITS = (
    ("a [cat] sitting on the grass", "a [dog] sitting on the grass", "1", "cat dog"),
    ("a cat sitting on the grass", "a [fluffy] cat sitting on the grass", "2", "cat cat"),
    ("a bird on a branch", "a bird on a branch, [watercolor]", "9", ""),
)


def write_benchmark(folder: Path, side: int = 512, edits=EDITS) -> dict:
    """A benchmark with one picture for each of the edits; returns what its mapping file holds."""
    mapping = {}
    for i, (source, target, type_id, blended) in enumerate(edits):
        name = f"{type_id}_made/1_artificial/{i:012}.png"
        path = folder / "annotation_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, side)).save(path)
        mapping[f"{i:012}"] = {
            "image_path": name,
            "original_prompt": source,
            "editing_prompt": target,
            "editing_instruction": "",
            "editing_type_id": type_id,
            "blended_word": blended,
            "mask": rectangle(side, side // 4, side // 4, side // 4, side // 4),
        }
    write_mapping(folder, mapping)
    return mapping


def write_mapping(folder: Path, mapping: object) -> None:
    (folder / "mapping_file.json").write_text(json.dumps(mapping), encoding="utf-8")


def tiny_dino():
    """A narrow ViT with patches of 16, seen as DINO is."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = ViTConfig(**sizes, patch_size=16, image_size=224, layer_norm_eps=1e-6)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in vit.parameters():  # fresh weights are so small that all tokens are alike
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return vit


def tiny_clip():
    """A narrow CLIP with CLIP's own vocabulary."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = narrow | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = narrow | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return clip


def squeezenet() -> nn.Sequential:
    """SqueezeNet 1.1's features with random weights, in torchvision's order and numbering."""

    class Fire(nn.Module):
        def __init__(self, given: int, squeezed: int, expanded: int) -> None:
            super().__init__()
            self.squeeze = nn.Conv2d(given, squeezed, 1)
            self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
            self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

        def forward(self, x):
            x = self.squeeze(x).relu()
            return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()),
        *(Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)),
        *(Fire(384, 64, 256), Fire(512, 64, 256)),
    )


# ----------------------------------------------------------------- the published arithmetic, as it was published


class FusedBlock(nn.Module):
    """A transformer block as DINO's own code has it: one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        b, n, c = x.shape
        self.kept = self.qkv(self.norm1(x))
        q, k, v = self.kept.reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FusedViT(nn.Module):
    """DINO's own network, with the weights of one of transformers."""

    def __init__(self, vit) -> None:
        super().__init__()
        config, state = vit.config, vit.state_dict()
        self.heads, self.patch = config.num_attention_heads, config.patch_size
        self.state = state
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        self.blocks = nn.ModuleList(FusedBlock(*sizes) for _ in range(config.num_hidden_layers))
        for i, block in enumerate(self.blocks):

            def find(*endings, part, layer=i):
                names = [n for n in state if f"layer.{layer}." in n or f"layers.{layer}." in n]
                return next(state[n] for n in names for end in endings if n.endswith(f"{end}.{part}"))

            for part in ("weight", "bias"):
                kinds = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
                with torch.no_grad():
                    getattr(block.qkv, part).copy_(torch.cat([find(*kind, part=part) for kind in kinds]))
                    getattr(block.proj, part).copy_(find("o_proj", "attention.output.dense", part=part))
                    getattr(block.norm1, part).copy_(find("layernorm_before", part=part))
                    getattr(block.norm2, part).copy_(find("layernorm_after", part=part))
                    getattr(block.fc1, part).copy_(find("mlp.fc1", "intermediate.dense", part=part))
                    getattr(block.fc2, part).copy_(find("mlp.fc2", ".output.dense", part=part))

    def forward(self, x):
        state = self.state
        projection = "embeddings.patch_embeddings.projection"
        x = F.conv2d(x, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=self.patch)
        x = torch.cat([state["embeddings.cls_token"], x.flatten(2).transpose(1, 2)], 1)
        x = x + state["embeddings.position_embeddings"]
        for block in self.blocks:
            x = block(x)
        return x


def published_structure_distance(one: np.ndarray, other: np.ndarray, network: FusedViT, *, smooth: bool) -> float:
    """Of square pictures: values up to 255, keys cut out of the fused projection, each head's, then side by side."""

    def similarity(array):
        x = torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32))[None]
        x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False, antialias=smooth)
        mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        network((x - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))
        qkv = network.blocks[-1].kept[0]
        tokens, width = qkv.shape[0], qkv.shape[1] // 3
        keys = qkv.reshape(tokens, 3, network.heads, width // network.heads).permute(1, 2, 0, 3)[1]
        joined = keys.transpose(0, 1).reshape(tokens, width)
        lengths = joined.norm(dim=1, keepdim=True)
        return joined @ joined.T / (lengths @ lengths.T).clamp(min=1e-8)

    with torch.no_grad():
        return float(F.mse_loss(similarity(one), similarity(other)))


def published_mask(runs: list[int], shape=(512, 512)) -> np.ndarray:
    """Pixel by pixel."""
    total = shape[0] * shape[1]
    flat = [0] * total
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for pixel in range(start, start + min(length, total - start)):
            flat[pixel] = 1
    mask = np.array(flat, np.float64).reshape(shape)
    for side in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        mask[side] = 1
    return mask
