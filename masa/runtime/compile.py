"""A compiled UNet: what no edit touches goes through torch.compile, whole forwards into CUDA graphs.

Edits change attentions only, whose products and softmax are fast kernels already. What a compiler gains is in the
residual blocks and MLPs, norms and gates fused, and those do not know which step, prompt or control they serve:
they are compiled once per shape. What is lost between kernels, a CUDA graph of the whole forward wins back: one
graph per structure of edits, whose tensors, like the latents, are copied into the graph's own before each replay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from masa.attention import Backend, Call
from masa.edits import Edit, Residuals, Tape
from masa.errors import MasaError
from masa.models.batch_rows import Retirement
from masa.models.resnet import ResnetBlock
from masa.models.transformer import FeedForward
from masa.models.unet import UNet

# Blocks of a kind share one Python function, so the compiler takes their shapes for recompilations of it, and
# would give up after 8.
MOST_SHAPES = 1024
# Graphs kept; a run needs a handful. Each holds its inputs and results on the device.
MOST_GRAPHS = 32

# What a forward gives, of tensors (x, timestep, context and the edits').
Forward = Callable[[tuple[Tensor, ...]], tuple[Tensor, Tape]]
# (a forward, its inputs) -> the same forward, as fast as it gets for inputs of these shapes.
Capture = Callable[[Forward, tuple[Tensor, ...]], Forward]


class CompiledUNet(UNet):
    """A UNet with compiled blocks, on the weights of another: same names, same results up to rounding."""

    def __init__(self, unet: UNet, compiler: str | Callable[..., Any], capture: Capture | None) -> None:
        nn.Module.__init__(self)
        shared: dict[int, Any] = {id(weight): weight for weight in unet.parameters()}
        self.config, self.sites = unet.config, unet.sites
        for name, child in unet.named_children():
            self.add_module(name, copy.deepcopy(child, shared))
        self.capture = capture
        self.captured: dict[object, Forward] = {}
        self.weights = tuple(self.parameters())  # held, so that no other takes the place of one that graphs read
        self.places = self._places()
        for module in self.modules():
            if isinstance(module, ResnetBlock | FeedForward):
                compiled = torch.compile(module.forward, backend=compiler, dynamic=False, fullgraph=True)
                module.forward = _unless_edited(compiled, module.forward)  # type: ignore[method-assign]

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        context: Tensor,
        edits: Mapping[int, Edit] | None = None,
        retire: Retirement | None = None,
        backend: Backend = "auto",
        checkpoint: bool = False,
        copies: tuple[int, ...] | None = None,
        residuals: Residuals | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tape]:
        """As `UNet.forward`. With a gradient to take, or masks, which index by host lists, nothing is captured."""
        # A number would be copied to the device anew, which a graph cannot do.
        time = torch.full((1,), timestep, device=x.device) if isinstance(timestep, int | float) else timestep
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, context))
        plain = edits or {}
        # Names of torch 2.6; later releases say recompile_limit and take these too.
        limits = torch._dynamo.config.patch(cache_size_limit=MOST_SHAPES, accumulated_cache_size_limit=MOST_SHAPES)
        with limits, _compiler_at_work():
            if graded or self.capture is None or any(edit.masks_keys for edit in plain.values()):
                with torch.set_grad_enabled(graded):  # the compiler tells the two modes apart
                    return super().forward(
                        x, time, context, plain, retire, backend, checkpoint, copies, residuals, guidance
                    )
            numbered, keys = number_records(plain)
            structure, tensors = split((numbered, residuals, guidance))
            inputs = (x, time, context, *tensors)

            def run(given: tuple[Tensor, ...]) -> tuple[Tensor, Tape]:
                joined = cast("tuple[dict[int, Edit], Residuals | None, Tensor | None]", join(structure, given[3:]))
                found, added, embedded = joined
                x, time, context = given[:3]
                return super(CompiledUNet, self).forward(
                    x, time, context, found, retire, backend, copies=copies, residuals=added, guidance=embedded
                )

            with torch.no_grad():
                if self.places != self._places():  # moved, converted or replaced: graphs would read the old ones
                    self.captured.clear()
                    self.weights, self.places = tuple(self.parameters()), self._places()
                # Strides too: a graph's input keeps the layout that it was captured with.
                key = (structure, retire, backend, copies, *((t.shape, t.stride(), t.dtype) for t in inputs))
                if key not in self.captured:
                    while len(self.captured) >= MOST_GRAPHS:  # before the capture, which may take the memory
                        del self.captured[next(iter(self.captured))]
                    self.captured[key] = self.capture(run, inputs)
                eps, tape = self.captured[key](inputs)
            return eps, {(keys.get(name, name), site): found for (name, site), found in tape.items()}

    def _places(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(weight), weight.data_ptr()) for weight in self.parameters())


def _unless_edited(compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function where no call with edits comes along, which differs from step to step."""

    def forward(*inputs: Any) -> Tensor:
        edited = any(isinstance(given, Call) for given in inputs)
        return plain(*inputs) if edited else compiled(*inputs)

    return forward


@contextmanager
def _compiler_at_work() -> Iterator[None]:
    """MasaError where torch.compile fails, such as without a C++ compiler."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = " ".join(str(error).split())[:200]
        raise MasaError(f"the compiler failed ({reason}); run without sd.compile() or --compile") from error


def compile_unet(unet: UNet, compiler: str | Callable[..., Any] = "inductor", cuda_graphs: bool | None = None) -> UNet:
    """The UNet compiled. compiler: torch.compile's backend. cuda_graphs: default on CUDA devices.

    MasaError for an unknown compiler, or graphs without a CUDA device.
    """
    device = unet.conv_in.weight.device
    if isinstance(compiler, str):
        known = torch._dynamo.list_backends(exclude_tags=())
        if compiler not in known:
            raise MasaError(f"compiler is {compiler!r}; expected one of {', '.join(map(repr, known))}")
    if cuda_graphs and device.type != "cuda":
        raise MasaError(f"cuda_graphs=True, and the model is on {device}; load it with device='cuda', or leave it out")
    if isinstance(unet, CompiledUNet):
        raise MasaError("the model is compiled already; compile the one that was loaded")
    graphs = device.type == "cuda" if cuda_graphs is None else cuda_graphs
    return CompiledUNet(unet, compiler, cuda_capture(device) if graphs else None)


def cuda_capture(device: torch.device) -> Capture:
    """Captures of forwards as CUDA graphs, which share one pool of memory: one forward's results are copied out
    before the next is replayed."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        # Of this device, where torch.cuda.graph would take one that all devices share; and one, since the memory
        # that is freed on a stream serves that stream alone.
        side = torch.cuda.Stream()

    def capture(run: Forward, inputs: tuple[Tensor, ...]) -> Forward:
        own = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
        with torch.cuda.device(device):
            # First not captured: compilers and libraries choose their kernels, which a capture cannot see.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    run(own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                results = run(own)
        return replayed(own, graph.replay, results)

    return capture


def replayed(own: tuple[Tensor, ...], replay: Callable[[], None], results: tuple[Tensor, Tape]) -> Forward:
    """The forward that copies its inputs into `own`, replays, and copies the results out."""

    def forward(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tape]:
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        replay()
        eps, tape = results
        return eps.clone(), {key: maps.clone() for key, maps in tape.items()}

    return forward


# ------------------------------------------------------------------------------------------------ edits' structure


def number_records(edits: Mapping[int, Edit]) -> tuple[dict[int, Edit], dict[Hashable, Hashable]]:
    """The edits with their records' keys numbered as they first appear, and the keys by number.

    Controls make their keys anew for each run, and a graph is to serve the next run too.
    """
    numbers: dict[Hashable, int] = {}

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    numbered = {}
    for site, edit in edits.items():
        records = tuple(replace(record, key=number(record.key)) for record in edit.records)
        numbered[site] = replace(edit, records=records, query_records=tuple(map(number, edit.query_records)))
    return numbered, {index: key for key, index in numbers.items()}


@dataclass(frozen=True)
class Node:
    """A dataclass, tuple or dict without its tensors; comparable and hashable, if what it holds is."""

    kind: type
    names: tuple[Any, ...]
    children: tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor: its index among all."""

    index: int


def split(value: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Nested dataclasses, tuples and dicts as a structure and the tensors in it."""
    tensors: list[Tensor] = []

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return Slot(len(tensors) - 1)
        if is_dataclass(value) and not isinstance(value, type):
            names = tuple(f.name for f in fields(value))
            return Node(type(value), names, tuple(walk(getattr(value, name)) for name in names))
        if isinstance(value, tuple):
            return Node(tuple, (), tuple(walk(item) for item in value))
        if isinstance(value, dict):
            return Node(dict, tuple(value), tuple(walk(item) for item in value.values()))
        return value

    return walk(value), tuple(tensors)


def join(structure: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The inverse of `split`, with these tensors."""
    if isinstance(structure, Slot):
        return tensors[structure.index]
    if not isinstance(structure, Node):
        return structure
    children = tuple(join(child, tensors) for child in structure.children)
    if structure.kind is tuple:
        return children
    if structure.kind is dict:
        return dict(zip(structure.names, children, strict=True))
    return structure.kind(**dict(zip(structure.names, children, strict=True)))
