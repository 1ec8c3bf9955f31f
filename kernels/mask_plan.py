"""Region masks for mutual attention, prepared once per mask and resolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masa.kernels.rows import RowIndex, pick_rows


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Which keys and queries belong to the foreground, and the orders in which the kernel visits them.

    Make one with `MaskPlan.build`; it may be used for any number of calls of the same resolution.

    key_region (S, Nk) bool, True = foreground; query_weight (B, Nq) float32 in [0, 1]; full_rows (B,) bool.
    key_order (S, Nk) int32 lists the foreground keys, then the background keys; key_count (S,) int32 counts
    the foreground. query_order (B, Nq) int32 lists the queries of weight 1, then the soft ones, then those of
    weight 0. binary: no weight lies strictly between 0 and 1, as far as the host knows.
    """

    key_region: Tensor
    query_weight: Tensor
    full_rows: Tensor
    key_order: Tensor
    key_count: Tensor
    query_order: Tensor
    binary: bool

    @classmethod
    def build(cls, key_region: Tensor, query_weight: Tensor, full_rows: Tensor | None = None) -> MaskPlan:
        """Plan masked mutual attention, without waiting for the device.

        key_region (S, Nk) bool: True where a source's key is foreground. query_weight (B, Nq): the share of
        the foreground's answer in each query's output, float in [0, 1] (clamped), or bool. full_rows (B,)
        bool: rows that ignore the mask and see every key (source rows); None means no such row.

        A bool query_weight tells the host that the mask is binary; a float one is inspected on the CPU and
        taken to be soft on a GPU, where inspecting it would wait. Raises ValueError for wrong shapes, dtypes
        or devices. MasaCtrl section 3.3.
        """
        if key_region.dim() != 2 or key_region.dtype != torch.bool:
            raise ValueError(
                f"key_region must be a bool tensor (S, Nk), got {key_region.dtype} {tuple(key_region.shape)}: "
                "threshold the mask and flatten its grid"
            )
        if query_weight.dim() != 2 or not (query_weight.is_floating_point() or query_weight.dtype == torch.bool):
            raise ValueError(
                f"query_weight must be a float or bool tensor (B, Nq), got {query_weight.dtype} "
                f"{tuple(query_weight.shape)}: convert the mask and flatten its grid"
            )
        if full_rows is None:
            full_rows = torch.zeros(query_weight.shape[0], dtype=torch.bool, device=query_weight.device)
        if full_rows.shape != query_weight.shape[:1] or full_rows.dtype != torch.bool:
            raise ValueError(
                f"full_rows must be a bool tensor ({query_weight.shape[0]},), one value per row of query_weight, "
                f"got {full_rows.dtype} {tuple(full_rows.shape)}"
            )
        devices = {key_region.device, query_weight.device, full_rows.device}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"key_region, query_weight and full_rows are on {names}: move them to one device")

        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # A plan outlives the call that makes it, and backward could not save inference tensors.
            with torch.inference_mode(False):
                key_region, query_weight, full_rows = (
                    x.clone() if x.is_inference() else x for x in (key_region, query_weight, full_rows)
                )
                return cls.build(key_region, query_weight, full_rows)
        binary = query_weight.dtype == torch.bool
        # Contiguous, because the kernel indexes these tensors flat.
        weight = query_weight.float().clamp(0, 1).contiguous()
        if not binary and weight.device.type == "cpu" and not torch.compiler.is_compiling():
            binary = bool(((weight == 0) | (weight == 1)).all())
        # A full row visits every key once, so its queries keep their own order.
        query_class = torch.where(weight == 1, 0, torch.where(weight == 0, 2, 1))
        query_class = query_class.masked_fill(full_rows[:, None], 0)
        return cls(
            key_region=key_region,
            query_weight=weight,
            full_rows=full_rows.contiguous(),
            key_order=_stable_order((~key_region).long(), classes=2),
            key_count=key_region.sum(dim=1, dtype=torch.int32),
            query_order=_stable_order(query_class, classes=3),
            binary=binary,
        )

    def effective_weight(self, rows: RowIndex) -> Tensor:
        """Weights (B, Nq) when row b reads source rows[b]: an empty region hands its queries to the other one."""
        count = pick_rows(self.key_count, rows)[:, None]
        weight = torch.where(count == self.key_region.shape[1], 1.0, self.query_weight)
        return torch.where(count == 0, 0.0, weight)


def _stable_order(label: Tensor, classes: int) -> Tensor:
    """Positions (R, N) int32 grouped by label (R, N) in 0..classes-1, keeping their order within a class."""
    place = torch.zeros_like(label)
    start = torch.zeros_like(label[:, :1])
    for value in range(classes):
        member = label == value
        place = torch.where(member, start + member.cumsum(dim=1) - 1, place)
        start = start + member.sum(dim=1, keepdim=True)
    position = torch.arange(label.shape[1], device=label.device).expand_as(label)
    return torch.empty(label.shape, dtype=torch.int64, device=label.device).scatter_(1, place, position).int()
