"""A checkpoint from the Hugging Face hub: from the local cache where it is complete, else from the network."""

from __future__ import annotations

import re
from pathlib import Path

from masa.errors import CheckpointError

PARTS = ("unet", "vae", "text_encoder")
# Names like these are meant as files.
FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")
SECONDS = 10.0  # to wait for the hub's first answer


def is_hub_id(text: str) -> bool:
    """Whether a string can be a hub id, "owner/name", by the hub's rules for names."""
    name = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    formed = re.fullmatch(rf"{name}/{name}", text, re.ASCII) is not None
    return formed and len(text) <= 96 and not re.search(r"--|\.\.|\.git$", text) and not text.endswith(FILE_SUFFIXES)


def fetch(hub_id: str, prefer_half: bool) -> Path:
    """The local folder of a hub checkpoint in diffusers layout, downloaded if need be.

    prefer_half: take the fp16 files where the repository has them. CheckpointError where it is neither cached
    nor reachable, or is no diffusers folder.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    missing = "not in the local cache"
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        lacking = [part for part in PARTS if not any((folder / part).glob("*.safetensors*"))]
        if not lacking:
            return folder
        missing = f"in the local cache without the safetensors files of its {', '.join(lacking)}"
    except LocalEntryNotFoundError:
        pass
    try:
        # Not list_repo_files(): where there is no network, that tries for half a minute.
        found = HfApi().model_info(hub_id, timeout=SECONDS).siblings or []
        wanted = choose_files(hub_id, [file.rfilename for file in found], prefer_half)
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except CheckpointError:
        raise
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{hub_id} is {missing} and offline mode is on (HF_HUB_OFFLINE); "
            "unset it, or give the path of a checkpoint on this machine"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"no path {hub_id} is here, and the hub refused it as an id ({_first_line(error)}); "
            "check the spelling, or log in where it is private or gated"
        ) from error
    except Exception as error:  # the HTTP library's own, which differ between releases of huggingface_hub
        raise CheckpointError(
            f"{hub_id} is no path here and {missing}, and could not be fetched from the hub ({_first_line(error)}); "
            "check the spelling and the network, or give the path of a checkpoint on this machine"
        ) from error


def choose_files(hub_id: str, files: list[str], prefer_half: bool) -> list[str]:
    """The files of a repository that a model needs: one set of safetensors per part, and the small ones."""
    chosen = [f for f in files if f == "model_index.json" or re.match(r"(tokenizer|scheduler)/", f)]
    for part in PARTS:
        weights = [f for f in files if f.startswith(f"{part}/") and ".safetensors" in f and "non_ema" not in f]
        half = [f for f in weights if ".fp16" in f]
        full = [f for f in weights if f not in half]
        picked = (half or full) if prefer_half else (full or half)
        if not picked:
            singles = [f for f in files if "/" not in f and f.endswith(".safetensors")]
            remedy = (
                f"download one of {', '.join(singles)} and give its path" if singles else "choose another repository"
            )
            raise CheckpointError(f"{hub_id} has no safetensors for its {part}; {remedy}")
        chosen += [*picked, *(f for f in files if f == f"{part}/config.json")]
    return chosen


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
