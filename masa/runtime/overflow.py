"""Autoencoders that overflow in half precision: what is not finite is computed again in float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from masa.runtime.networks import Autoencoder


class MendedVAE:
    """An autoencoder, and its copy in float32 once a result was not finite; for one picture after another."""

    def __init__(self, network: Autoencoder, dtype: torch.dtype) -> None:
        self.network = network
        self.dtype = dtype
        self.exact: Autoencoder | None = None

    def finite(self, compute: Callable[[Autoencoder, Tensor], Tensor], given: Tensor, what: str) -> Tensor:
        """`compute` of the network and its input, which is float32; again in float32 where that is not finite.

        what: names it in the warning. A result that float32 cannot mend either is given as it is.
        """
        found = compute(self.network, given.to(self.dtype))
        if self.dtype == torch.float32 or bool(torch.isfinite(found).all()):
            return found
        if self.exact is None:
            self.exact = copy.deepcopy(self.network).float()
        again = compute(self.exact, given.float())
        if bool(torch.isfinite(again).all()):
            name = str(self.dtype).removeprefix("torch.")
            warnings.warn(
                f"the autoencoder's {what} was not finite in {name} and is repeated in float32; its values are too "
                f"large for {name}: another autoencoder as vae= would save the time",
                stacklevel=4,
            )
            return again
        return found
