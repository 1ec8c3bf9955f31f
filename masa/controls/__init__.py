"""The controls, one method a file, and what it takes to write another: see docs/add_a_control.md."""

from masa.branches import SOURCE, Branches, Row
from masa.controls.base import ActiveControl, Control, FileControl, Run, choose_layers, choose_steps, find_words
from masa.controls.checks import check_flag, check_fraction, check_list, check_whole, is_number
from masa.edits import Edit, ExtraKeys, Mix, Part, Record, Residuals, Site, Tape

__all__ = [
    "SOURCE",
    "ActiveControl",
    "Branches",
    "Control",
    "Edit",
    "ExtraKeys",
    "FileControl",
    "Mix",
    "Part",
    "Record",
    "Residuals",
    "Row",
    "Run",
    "Site",
    "Tape",
    "check_flag",
    "check_fraction",
    "check_list",
    "check_whole",
    "choose_layers",
    "choose_steps",
    "find_words",
    "is_number",
]
