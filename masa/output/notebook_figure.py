"""A figure that shows itself in a notebook, whichever backend is at work there. Imports matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """matplotlib's figure; outside notebooks there is no difference."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
