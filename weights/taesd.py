"""TAESD's files: the original encoder and decoder, apart or together, and diffusers' AutoencoderTiny."""

from __future__ import annotations

import re
from pathlib import Path

from masa.config import TinyVAEConfig
from masa.errors import CheckpointError
from masa.weights.checkpoint import Entries

# "taesd_decoder.3.conv.0.weight", "decoder.layers.2.conv.0.weight" (diffusers counts from the convolution), or, where a
# file holds one of the two, "3.conv.0.weight".
KEY = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.)?(layers\.)?(\d+)\.((?:conv\.\d+\.)?(?:weight|bias))")
EXPECTED = "give taesd_decoder.safetensors, a folder with taesd_encoder.safetensors beside it, or diffusers' folder"
REPOSITORY_FILES = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")


def is_tiny(entries: Entries) -> bool:
    """Whether tensors are TAESD's, by their names: all of them, for few of these are its own."""
    return bool(entries) and all(KEY.fullmatch(key) for key in entries)


def tiny_names(entries: Entries, path: Path) -> tuple[TinyVAEConfig, dict[str, str], Entries]:
    """The configuration, and our names of the parameters -> the file's keys, and the tensors under those keys.

    CheckpointError for an encoder alone, and for latents that are not Stable Diffusion v1's.
    """
    # Without a prefix the decoder's first layer, the tanh, has no tensors.
    alone = "encoder" if "0.weight" in entries else "decoder"
    names = {}
    for key in entries:
        match = KEY.fullmatch(key)
        assert match is not None
        coder, layers, number, rest = match[1] or alone, match[2], int(match[3]), match[4]
        number -= coder == "decoder" and not layers
        names[f"{coder}.layers.{number}.{rest}"] = key
    first = names.get("decoder.layers.0.weight")
    if first is None:
        raise CheckpointError(f"{path} is TAESD's encoder without its decoder; {EXPECTED}")
    channels = entries[first].shape[1] if len(entries[first].shape) == 4 else 0
    if channels != TinyVAEConfig.latent_channels:
        raise CheckpointError(
            f"{path} decodes {channels} latent channels (TAESD of another model, such as SD 3 or Flux), and Stable "
            f"Diffusion v1 has {TinyVAEConfig.latent_channels}; {EXPECTED}"
        )
    encodes = any(name.startswith("encoder.") for name in names)
    return TinyVAEConfig(encodes=encodes), names, entries
