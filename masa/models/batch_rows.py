"""Which rows of the batch are at work as the UNet runs. A reader of `UNet.forward` may skip it.

Fewer at first: the two halves of guidance differ from the first prompt that they read on, and are one row until then.
Fewer in the end: a source leaves when nobody reads more of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from masa.attention import Call
from masa.edits import RowTuple, take
from masa.errors import MasaError
from masa.models.resnet import emb_of
from masa.models.transformer import Transformer


@dataclass(frozen=True)
class Retirement:
    """Rows that leave the batch in the transformer block `layer`: `staying` are the others.

    They leave when nobody reads more of them: in self-attention, if its edit only names rows, else after the block.
    """

    layer: int
    staying: RowTuple


class BatchRows:
    """The rows of one forward: their timestep's embedding and their prompts, for those at work.

    x (rows of x, ..), emb (1 or rows of x, width), context (rows, 77, width); copies, retire and checkpoint as in
    `UNet.forward`. MasaError where they do not fit.
    """

    def __init__(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        copies: RowTuple | None,
        retire: Retirement | None,
        checkpoint: bool,
    ) -> None:
        if len(context) != len(x if copies is None else copies) or any(not 0 <= r < len(x) for r in copies or ()):
            raise MasaError(
                f"context has {len(context)} rows, x {len(x)} and copies is {copies}; expected one row of x for each "
                "of context, or as many copies, each a row of x"
            )
        if len(emb) not in (1, len(x)):
            raise MasaError(
                f"timestep has {len(emb)} rows and x {len(x)}; expected one timestep, or one for each row of x"
            )
        self.emb = emb
        self.context = context
        self.copies = copies
        self.retire = retire
        self.checkpoint = checkpoint

    def through(self, module: nn.Module, *inputs: object) -> Tensor:
        """The module's output, computed again on the way back where a gradient is to be taken in little memory."""
        if self.checkpoint:
            return recompute(module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return module(*inputs)

    def through_transformer(self, module: Transformer, x: Tensor, call: Call) -> Tensor:
        """As `through`; here copies become rows of their own, and rows leave."""
        retires = self.retire is not None and module.layer == self.retire.layer
        staying = self.retire.staying if self.retire is not None and retires else None
        x = self.through(module, x, self.context, call, self.copies, staying)
        if self.copies is not None:
            self.emb, self.copies = emb_of(self.emb, self.copies), None
        if staying is not None:
            self.emb, self.context = emb_of(self.emb, staying), take(self.context, staying)
        return x

    def spread(self, x: Tensor) -> Tensor:
        """Every row on its own from the start."""
        if self.copies is None:
            return x
        copies, self.copies = self.copies, None
        self.emb = emb_of(self.emb, copies)
        return take(x, copies)

    def as_stored(self, x: Tensor) -> Tensor:
        """Every row, as the way up will want it."""
        return x if self.copies is None else take(x, self.copies)

    def still_here(self, skip: Tensor) -> Tensor:
        """A stored map without the rows that have left since."""
        gone = self.retire is not None and len(skip) != len(self.context)
        return take(skip, self.retire.staying) if self.retire is not None and gone else skip

    def add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x plus a residual (all rows of the batch, ..), of which those at work are taken."""
        if residual is None:
            return x
        return x + self.still_here(residual.to(x.dtype))
