"""load(): from a checkpoint to a StableDiffusion, the model's parts in one value."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from masa.config import ModelConfig
from masa.errors import CheckpointError, MasaError
from masa.io.pictures import ImageLike, load_image, to_pil
from masa.models import tiling
from masa.models.clip import TextEncoder
from masa.models.tokenizer import Tokenizer
from masa.models.unet import UNet, guidance_embedding
from masa.output.notebook import table_html
from masa.runtime.embeddings import (
    Embedding,
    EmbeddingGiven,
    as_embeddings,
    open_embeddings,
    recorded,
    with_words,
)
from masa.runtime.lora import (
    Lora,
    LoraGiven,
    LoraPath,
    LoraWeight,
    as_loras,
    check_weight,
    merge,
    open_loras,
    warn_of_words,
)
from masa.runtime.networks import Autoencoder, Network, build_models, meta_models, weight_samples
from masa.runtime.offload import OffloadedNetworks
from masa.runtime.origin import Origin
from masa.runtime.overflow import MendedVAE
from masa.schedule import Schedule
from masa.weights import hub
from masa.weights.model_files import Checkpoint, open_checkpoint

DEMO = Path(hub.__file__).parent / "demo" / "model"

LORA_OFFLOADED = (
    "offload=True on a CPU reads the checkpoint's own weights anew, without a LoRA; leave one of the two out"
)

DTYPE_NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, eq=False, repr=False)
class StableDiffusion:
    """The parts of a Stable Diffusion v1 model in one dtype and, unless offloaded, on one device.

    offload: as `load` was told. offloaded: of an offloaded model on a CPU, what empties and fills its networks.
    compiled: the UNet's compiler, by name. cuda_graphs: as `compile` was told. base: of a model with LoRAs, the one
    without.
    """

    unet: UNet
    vae: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    config: ModelConfig
    origin: Origin
    offload: bool = False
    offloaded: OffloadedNetworks | None = None
    compiled: str | None = None
    cuda_graphs: bool | None = None
    base: StableDiffusion | None = None

    def __repr__(self) -> str:
        parameters = sum(p.numel() for m in (self.unet, self.vae, self.text_encoder) for p in m.parameters())
        own = {"EMA weights": self.origin.ema, "v-prediction": self.config.unet.velocity is not None}
        own[f"clip skip {self.config.text.clip_skip}"] = self.config.text.clip_skip > 0
        chosen = "".join(f", {what}" for what, has in own.items() if has)
        return f"StableDiffusion({self.checkpoint!r}, {parameters:,} parameters, {self.dtype}, {self.device}{chosen})"

    def _repr_html_(self) -> str:
        networks = {"UNet": self.unet, "autoencoder": self.vae, "text encoder": self.text_encoder}
        parts = {name: f"{sum(p.numel() for p in net.parameters()):,} parameters" for name, net in networks.items()}
        loras = {f"LoRA {lora.path}": f"weight {lora.weight}" for lora in self.origin.lora}
        side = {"picture size": f"{self.config.image_size}x{self.config.image_size}"}
        words = {f"word {word}": f"{len(ids)} tokens" for word, ids in self.tokenizer.words.items()}
        return f"<code>{escape(repr(self))}</code>" + table_html("parts", parts | loras | words | side)

    @property
    def checkpoint(self) -> str:
        """What load() was given."""
        return self.origin.checkpoint

    @property
    def fingerprint(self) -> str:
        """A digest of the weights as loaded: it differs between models, and between dtypes of the same model."""
        digest = hashlib.sha256()
        for network in (self.unet, self.vae, self.text_encoder):
            digest.update(weight_samples(network) if self.offloaded is None else self.offloaded.weight_samples(network))
        for lora in self.origin.lora:  # in half precision a weak one may change none of the samples
            if any(lora.weights.values()):
                digest.update(f"{lora.sha256} {lora.weights}".encode())
        for embedding in self.origin.embeddings:
            digest.update(f"{embedding.sha256} {embedding.name}".encode())
        if self.config.text.clip_skip or self.config.unet.velocity:
            digest.update(f"{self.config.text.clip_skip} {self.config.unet.velocity}".encode())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device if self.offloaded is None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def compile(
        self, *, compiler: str | Callable[..., Any] = "inductor", cuda_graphs: bool | None = None
    ) -> StableDiffusion:
        """This model with its UNet compiled, on the same weights: faster once the first steps have compiled it.

        compiler: torch.compile's backend, by name or as a function. cuda_graphs: replay whole steps as CUDA
        graphs, one per structure of edits; default on a CUDA device. Results agree up to rounding. Raises MasaError
        for an unknown compiler, graphs without a CUDA device, or a model that is compiled already.
        """
        from masa.runtime.compile import compile_unet  # the compiler takes seconds to import

        if self.offloaded is not None:
            raise MasaError(
                "offload=True on a CPU reads the UNet's weights anew, and a compiled UNet keeps them; leave one of the "
                "two out"
            )
        name = compiler if isinstance(compiler, str) else getattr(compiler, "__name__", type(compiler).__name__)
        unet = compile_unet(self.unet, compiler, cuda_graphs)
        return replace(self, unet=unet, compiled=name, cuda_graphs=cuda_graphs)

    def with_lora(self, path: LoraPath, weight: LoraWeight = 1.0) -> StableDiffusion:
        """This model with a LoRA merged into UNet and text encoder, beside those that it has; it stays as it is.

        path: a safetensors file, or its folder, as kohya's scripts, diffusers, peft or cloneofsimo's write it. weight:
        how strongly it acts, or (on the UNet, on the text encoder); 0 leaves the very bits, and below 0 it acts the
        other way. The two models share all weights that it does not change. Raises CheckpointError for a file that does
        not fit, and lists what in it; MasaError for a compiled model, and one offloaded on a CPU.
        """
        return self.with_loras((Lora(str(path), check_weight(weight)),))

    def with_loras(self, loras: Sequence[Lora]) -> StableDiffusion:
        """As `with_lora`, of several; one with a digest must be the file that has it."""
        if not loras:
            return self
        if self.offloaded is not None:
            raise MasaError(LORA_OFFLOADED)
        if self.compiled is not None:
            raise MasaError("this model is compiled, on weights that a LoRA would change; merge it first, then compile")
        base = self.without_lora()
        loras = (*self.origin.lora, *loras)  # all anew, so that they are summed in float32 and rounded once
        opened = open_loras(loras, base.unet, base.text_encoder)
        warn_of_words(opened, base.tokenizer.words)
        unet, text_encoder = merge(base.unet, base.text_encoder, loras, opened)
        merged = tuple(replace(lora, sha256=found.sha256) for lora, found in zip(loras, opened, strict=True))
        origin = replace(base.origin, lora=merged)
        return replace(base, unet=unet, text_encoder=text_encoder, origin=origin, base=base)

    def without_lora(self) -> StableDiffusion:
        """The model before any LoRA was merged into it, to the bit, and not compiled; itself where none was."""
        return self if self.base is None else self.base

    def with_embeddings(
        self, embeddings: EmbeddingGiven | Sequence[EmbeddingGiven | Embedding] | None
    ) -> StableDiffusion:
        """This model with words of textual inversion, beside those that it knows; it stays as it is.

        embeddings: a safetensors file, (name, file), or a list of these. A word is its file's key, or where that is
        none its file's name; in a prompt it stands for its vectors' tokens, case aside, as a whole word. The two models
        share all weights. Raises CheckpointError for a file that is no embedding of this model, MasaError for a name
        that is taken. 2208.01618.
        """
        return self._knowing((*self.origin.embeddings, *as_embeddings(embeddings)))

    def without_embeddings(self) -> StableDiffusion:
        """The model without any words of textual inversion."""
        return self._knowing(()) if self.origin.embeddings else self

    def _knowing(self, embeddings: Sequence[Embedding]) -> StableDiffusion:
        """The model with these words, and no others."""
        opened = open_embeddings(embeddings, self.config.text.width)
        text_encoder, tokenizer = with_words(self.text_encoder, self.tokenizer, opened, self.dtype)
        offloaded = self.offloaded
        if offloaded is not None and offloaded.holds(self.text_encoder):
            offloaded = replace(offloaded, networks=(*offloaded.networks[:2], text_encoder))
        return replace(
            self,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            origin=replace(self.origin, embeddings=recorded(embeddings, opened)),
            offloaded=offloaded,
            base=None if self.base is None else self.base._knowing(embeddings),
        )

    @torch.no_grad()
    def encode_image(
        self, image: ImageLike, *, height: int | None = None, width: int | None = None, tiled: bool | None = None
    ) -> Tensor:
        """A picture -> latents (1, 4, h/8, w/8), float32: the posterior mean times 0.18215.

        Without height and width the picture is scaled to the model's training size on its short side and
        cropped to multiples of 64. tiled: in overlapping tiles, which takes less memory and changes the result; default
        where a side is over 768 pixels.
        """
        picture = load_image(image, short_side=self.config.image_size, height=height, width=width)
        picture = picture.to(self.device)
        with self._at_work(self.vae):
            mended = MendedVAE(self.vae, self.dtype)
            return mended.finite(lambda vae, x: tiling.encode(vae, x, tiled), picture, "encoding").float()

    @torch.no_grad()
    def decode_latents(
        self, latents: Tensor, *, progress: bool = False, tiled: bool | None = None
    ) -> list[Image.Image]:
        """Latents (n, 4, h, w) -> n pictures of 8h x 8w pixels, decoded one at a time; tiled as in encode_image."""
        bar = tqdm(latents.to(self.device), desc="decode", disable=not progress)
        with self._at_work(self.vae):
            mended = MendedVAE(self.vae, self.dtype)
            pictures = (mended.finite(lambda vae, x: tiling.decode(vae, x, tiled), z[None], "decoding") for z in bar)
            return [to_pil(picture)[0] for picture in pictures]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet is told its guidance, beside the timestep, and has no unconditional half."""
        return self.config.unet.guidance_width > 0

    def embed_guidance(self, guidance_scale: float) -> Tensor | None:
        """What such a UNet is told, (1, guidance_width); None for any other."""
        if not self.embeds_guidance:
            return None
        return guidance_embedding(guidance_scale, self.config.unet.guidance_width, self.unet.conv_in.weight)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> context (n, 77, width)."""
        if isinstance(prompts, str):
            raise MasaError(f"encode_prompt takes a list of prompts; give [{prompts!r}]")
        with self._at_work(self.text_encoder):
            return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @contextmanager
    def _at_work(self, network: Network) -> Iterator[None]:
        """The network ready; offloaded, it goes back afterwards, also if it did not fit."""
        if self.offloaded is not None:
            with self.offloaded.at_work(network):
                yield
            return
        if not self.offload:
            yield
            return
        try:
            network.to(self.device)
            yield
        finally:
            network.to("cpu")


def load(
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    lora: LoraGiven | Sequence[LoraGiven] | None = None,
    embeddings: EmbeddingGiven | Sequence[EmbeddingGiven] | None = None,
    clip_skip: int = 0,
    prediction_type: str | None = None,
    ema: bool = False,
    offload: bool = False,
    progress: bool = True,
) -> StableDiffusion:
    """Load a Stable Diffusion v1 model.

    checkpoint: a single safetensors file in LDM layout, a diffusers-layout folder, a hub id ("owner/name"), or
    None for the demo model that ships with the library. device: default cuda where there is one, else cpu.
    dtype: a torch dtype or "fp32", "fp16", "bf16"; default float16 on cuda, bfloat16 on a CPU with AMX or
    AVX512-BF16, else float32. tokenizer: a folder with vocab.json and merges.txt; default the checkpoint's
    own, else CLIP's. vae: another autoencoder's file or folder; also TAESD's, which decodes in no time, a little less
    sharp, and cannot encode where its encoder is missing. lora: a LoRA's path, (path, weight), or a list of
    these, merged as `StableDiffusion.with_lora` does. embeddings: textual inversion's, a path, (name, path), or a list
    of these, as `StableDiffusion.with_embeddings` takes them. progress: a bar while a large file is read.

    clip_skip: how many of the text encoder's last layers are left out, as diffusers counts: 1 is what others call clip
    skip 2. prediction_type: "epsilon" or "v_prediction", where the files do not say what the UNet predicts, or wrongly.
    ema: take the averaged weights that some files hold beside the plain ones.

    offload: less memory. Of a GPU, text encoder and VAE are there only while they work, else in the CPU's memory. On
    a CPU, only while they work in memory at all: each use reads its network from the checkpoint's files, which must
    stay as they are, and the UNet makes room for the VAE and is read again after it. Such a model is for inference:
    changed weights are refused (MasaError), and so are `compile` and LoRAs.

    Raises CheckpointError, with reason and remedy, for whatever is not a whole Stable Diffusion v1 model.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    loras = as_loras(lora)
    if loras and offload and device.type == "cpu":
        raise MasaError(LORA_OFFLOADED)
    prefer_half, vae_path = dtype == torch.float16, None if vae is None else Path(vae)
    opened = open_checkpoint(
        locate(checkpoint, prefer_half=prefer_half),
        prefer_half=prefer_half,
        vae=vae_path,
        ema=ema,
        prediction_type=prediction_type,
    ).skipping(clip_skip)
    if opened.plain_beside_ema:
        warnings.warn(
            f"{opened.path} holds plain and averaged (EMA) weights, and the plain ones are taken; ema=True takes the "
            "others",
            stacklevel=2,
        )
    words = choose_tokenizer(opened, tokenizer)
    open_embeddings(as_embeddings(embeddings), opened.config.text.width)
    if loras:  # what does not fit is found before the model's weights are read
        unet, _, text_encoder = meta_models(opened.config)
        open_loras(loras, unet, text_encoder)
    offloaded = None
    if offload and device.type == "cpu":
        offloaded = OffloadedNetworks.read(opened, dtype, progress)
    networks = build_models(opened, dtype, device, progress, offload) if offloaded is None else offloaded.networks
    sd = StableDiffusion(
        *networks,
        words,
        Schedule(opened.config.schedule),
        opened.config,
        Origin(
            "demo" if checkpoint is None else str(checkpoint),
            None if vae is None else str(vae),
            None if tokenizer is None else str(tokenizer),
            clip_skip=clip_skip,
            prediction_type=prediction_type,
            ema=ema,
        ),
        offload,
        offloaded,
    )
    sd = sd.with_embeddings(embeddings) if embeddings else sd
    return sd.with_loras(loras)


def choose_tokenizer(opened: Checkpoint, folder: str | Path | None) -> Tokenizer:
    """The tokenizer asked for, or the checkpoint's own, or CLIP's. CheckpointError for one with too many tokens."""
    if folder is not None:
        words = Tokenizer.from_folder(folder)
    else:
        words = Tokenizer.from_folder(opened.tokenizer) if opened.tokenizer else Tokenizer.clip()
    if words.vocab_size > opened.config.text.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {words.vocab_size:,} tokens and {opened.path}'s text encoder knows "
            f"{opened.config.text.vocab_size:,}; give its own tokenizer's folder as tokenizer="
        )
    return words


def locate(checkpoint: str | Path | None, prefer_half: bool) -> Path:
    """The path that load()'s first argument means; a hub id is downloaded where it is not cached."""
    if not isinstance(checkpoint, str | Path | None):
        raise MasaError(f"checkpoint is {checkpoint!r}; expected a path, a hub id, or None for the demo model")
    if checkpoint is None or checkpoint == "demo":  # "./demo" is a local one
        return DEMO
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    if isinstance(checkpoint, str) and hub.is_hub_id(checkpoint):
        return hub.fetch(checkpoint, prefer_half)
    raise FileNotFoundError(
        f"no checkpoint at {checkpoint}; expected a .safetensors file, a diffusers-layout folder or a hub id owner/name"
    )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or cuda where there is one, else cpu."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise MasaError(f"device is {device!r}; expected such as 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise MasaError(f"device is {device!r}, and torch sees no CUDA GPU here; use device='cpu'")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the fastest that the device computes natively."""
    if dtype is None:
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    chosen = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise MasaError(f"dtype is {dtype!r}; expected fp32, fp16 or bf16")
    if device.type == "cpu" and chosen != torch.float32 and not (chosen == torch.bfloat16 and cpu_has_bf16()):
        name = str(chosen).removeprefix("torch.")
        warnings.warn(f"this CPU only emulates {name}, at a small fraction of float32's speed", stacklevel=3)
    return chosen


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
