"""masa: MasaCtrl and its neighbours on Stable Diffusion v1, from scratch in PyTorch."""

__version__ = "0.1.0"

from masa.config import ModelConfig, ScheduleConfig
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.errors import CheckpointError, MasaError
from masa.inversion import Trajectory, invert
from masa.pipeline import StableDiffusion, load
from masa.rerun import rerun
from masa.result import Result
from masa.sampling import edit, sample
from masa.schedule import Schedule

__all__ = [
    "CheckpointError",
    "GivenMasks",
    "MasaCtrl",
    "MasaError",
    "ModelConfig",
    "Result",
    "Schedule",
    "ScheduleConfig",
    "StableDiffusion",
    "Trajectory",
    "WordMasks",
    "edit",
    "invert",
    "load",
    "rerun",
    "sample",
]
