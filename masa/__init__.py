"""masa: MasaCtrl and its neighbours on Stable Diffusion v1, from scratch in PyTorch."""

from pathlib import Path as _Path

# kernels/ and weights/ lie beside this folder in a checkout, and in it where the library is installed.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__version__ = "0.1.0"

from masa.cache.source_cache import SourceCache
from masa.config import ModelConfig, ScheduleConfig
from masa.controls.blended import BlendedLatents
from masa.controls.controlnet import ControlNet
from masa.controls.freeu import FreeU
from masa.controls.ip_adapter import IPAdapter
from masa.controls.live_preview import LivePreview
from masa.controls.local_blend import LocalBlend
from masa.controls.masactrl import MasaCtrl
from masa.controls.masks import GivenMasks, WordMasks
from masa.controls.plug_and_play import PlugAndPlay
from masa.controls.prompt_to_prompt import PromptToPrompt
from masa.controls.record import RecordAttention, RecordPredictions, RecordQueries
from masa.controls.style import StyleTransfer
from masa.controls.t2i_adapter import T2IAdapter
from masa.errors import CheckpointError, MasaError
from masa.guidance import ClassifierFree, Guidance, GuidanceInterval, RescaledGuidance
from masa.inversion import invert
from masa.io import condition_pictures as conditions
from masa.output import plots
from masa.output.frames import Frames
from masa.output.result import Result
from masa.pipeline import StableDiffusion, load
from masa.runtime.adapters import keep_networks
from masa.samplers.base import Sampler
from masa.samplers.ddim import DDIM
from masa.samplers.dpm_solver import DPMSolverPP
from masa.samplers.euler import Euler
from masa.samplers.lcm import LCM
from masa.samplers.unipc import UniPC
from masa.sampling import edit, sample
from masa.schedule import Schedule
from masa.settings import register
from masa.trajectory import Trajectory
from masa.workflows.batch import BatchReport, batch
from masa.workflows.frames import sample_frames
from masa.workflows.piebench import piebench
from masa.workflows.piebench_tables import PieBench
from masa.workflows.recording import record
from masa.workflows.rerun import rerun
from masa.workflows.sdedit import sdedit
from masa.workflows.sheets import grid, sweep

__all__ = [
    "DDIM",
    "LCM",
    "BatchReport",
    "BlendedLatents",
    "CheckpointError",
    "ClassifierFree",
    "ControlNet",
    "DPMSolverPP",
    "Euler",
    "Frames",
    "FreeU",
    "GivenMasks",
    "Guidance",
    "GuidanceInterval",
    "IPAdapter",
    "LivePreview",
    "LocalBlend",
    "MasaCtrl",
    "MasaError",
    "ModelConfig",
    "PieBench",
    "PlugAndPlay",
    "PromptToPrompt",
    "RecordAttention",
    "RecordPredictions",
    "RecordQueries",
    "RescaledGuidance",
    "Result",
    "Sampler",
    "Schedule",
    "ScheduleConfig",
    "SourceCache",
    "StableDiffusion",
    "StyleTransfer",
    "T2IAdapter",
    "Trajectory",
    "UniPC",
    "WordMasks",
    "batch",
    "conditions",
    "edit",
    "grid",
    "invert",
    "keep_networks",
    "load",
    "piebench",
    "plots",
    "record",
    "register",
    "rerun",
    "sample",
    "sample_frames",
    "sdedit",
    "sweep",
]


def __dir__() -> list[str]:
    """The public names alone: what completion shows."""
    return [*__all__, "__version__"]
