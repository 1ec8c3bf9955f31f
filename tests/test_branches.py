"""Rows of the batch: their order, and what they become."""

from __future__ import annotations

import torch

from masa.branches import Branches, Row


def test_rows_are_in_the_published_order():
    assert Branches.build(2, guided=True).rows == (
        Row(0, ("uncond",)),
        Row(1, ("uncond",)),
        Row(2, ("uncond",)),
        Row(0, ("cond",)),
        Row(1, ("cond",)),
        Row(2, ("cond",)),
    )


def test_every_row_reads_the_source_of_its_half():
    assert Branches.build(2, guided=True).source_rows == (0, 0, 0, 3, 3, 3)
    assert Branches.build(2, guided=False).source_rows == (0, 0, 0)
    # A source whose two prompts are equal has one row, which serves both halves.
    merged = Branches.build(2, guided=True, merge_source=True)
    assert len(merged) == 5
    assert merged.source_rows == (0, 0, 0, 0, 0)


def test_without_the_source_only_targets_are_present():
    full = Branches.build(2, guided=True)
    branches = full.select(full.without_source())
    assert branches.present == (1, 2)
    assert len(branches) == 4


def test_copies_name_each_rows_branch_among_those_present():
    branches = Branches.build(2, guided=True, merge_source=True)
    assert branches.copies == (0, 1, 2, 1, 2)
    assert branches.select(branches.without_source()).copies == (0, 1, 0, 1)
    assert Branches.build(2, guided=False).copies is None


def test_contexts_follow_the_halves():
    uncond, cond = torch.zeros(1, 77, 2), torch.arange(1.0, 4.0).reshape(3, 1, 1).expand(3, 77, 2)
    branches = Branches.build(2, guided=True)
    assert branches.contexts(uncond, cond)[:, 0, 0].tolist() == [0, 0, 0, 1, 2, 3]


def test_a_source_may_be_guided_alone():
    """A replayed source keeps its two halves where the targets have one."""
    branches = Branches.build(2, guided=False, source_guided=True)
    assert [(row.branch, row.halves) for row in branches.rows] == [
        (0, ("uncond",)), (0, ("cond",)), (1, ("cond",)), (2, ("cond",))
    ]  # fmt: skip
    assert branches.source_rows == (0, 1, 1, 1)
    merged = Branches.build(2, guided=False, merge_source=True, source_guided=True)
    assert merged == Branches.build(2, guided=False)
