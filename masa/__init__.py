"""masa: MasaCtrl and its neighbours on Stable Diffusion v1, from scratch in PyTorch."""

__version__ = "0.1.0"

from masa.config import ModelConfig, ScheduleConfig
from masa.controls.blended import BlendedLatents
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.controls.style import StyleTransfer
from masa.errors import CheckpointError, MasaError
from masa.inversion import invert
from masa.pipeline import StableDiffusion, load
from masa.recording import record
from masa.rerun import rerun
from masa.result import Result
from masa.sampling import edit, sample
from masa.schedule import Schedule
from masa.sdedit import sdedit
from masa.sheets import grid, sweep
from masa.source_cache import SourceCache
from masa.trajectory import Trajectory

__all__ = [
    "BlendedLatents",
    "CheckpointError",
    "GivenMasks",
    "LocalBlend",
    "MasaCtrl",
    "MasaError",
    "ModelConfig",
    "PlugAndPlay",
    "PromptToPrompt",
    "RecordAttention",
    "RecordPredictions",
    "RecordQueries",
    "Result",
    "Schedule",
    "ScheduleConfig",
    "SourceCache",
    "StableDiffusion",
    "StyleTransfer",
    "Trajectory",
    "WordMasks",
    "edit",
    "grid",
    "invert",
    "load",
    "record",
    "rerun",
    "sample",
    "sdedit",
    "sweep",
]
