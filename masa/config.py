"""Shapes and constants of the four parts of a Stable Diffusion v1 model, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

# Red, green and blue in [-1, 1] of a unit in each latent channel, then of none: (channels + 1, 3).
PreviewFactors = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ScheduleConfig:
    """The training noise: betas whose square roots are evenly spaced ("scaled linear")."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    training_timesteps: int = 1000


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser: four levels, the last without attention; 16 transformer blocks at two per level."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    context_width: int = 768
    heads: int = 8
    norm_groups: int = 32
    velocity: ScheduleConfig | None = None  # the training noise of a network that predicts v; None: it predicts eps
    guidance_width: int = 0  # of guidance embedded beside the timestep, 256 in latent consistency models; 0: none


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter: how many channels its picture has once 8 x 8 pixels are one position, and its levels' widths."""

    in_channels: int = 192
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    light: bool = False  # the colour adapter's kind, a quarter as wide inside its levels


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter: what it reads of a picture, and how many tokens it makes of it."""

    picture_width: int = 1024  # of the encoder's embedding, or of its hidden states
    context_width: int = 768
    tokens: int = 4
    plus: bool = False  # it reads hidden states, through a resampler
    layers: int = 4
    inner_width: int = 768
    head_width: int = 64


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents, which are 8 times smaller on each side."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsample(self) -> int:
        """Picture pixels per latent pixel, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TinyVAEConfig:
    """TAESD, the tiny autoencoder. encodes: with its encoder."""

    latent_channels: int = 4
    downsample: int = 8
    encodes: bool = True


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text encoder."""

    vocab_size: int = 49408
    width: int = 768
    intermediate_width: int = 3072
    layers: int = 12
    heads: int = 12
    tokens: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    clip_skip: int = 0  # last layers that are left out, as diffusers counts them


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a checkpoint's shapes and configuration files tell."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig | TinyVAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    image_size: int = 512  # side of the pictures that the model was trained on, in pixels
    preview: PreviewFactors | None = None  # the latents' colours, where the checkpoint tells them


SD_V1 = ModelConfig()
