"""The figure that ``show`` and ``explain`` return; imported when one is drawn, for matplotlib."""

from io import BytesIO
from typing import final

from matplotlib.figure import Figure

# Dots per inch of a figure in a notebook.
_DPI = 100


@final
class NotebookFigure(Figure):
    """A matplotlib figure that notebooks show though pyplot does not know of it."""

    def _repr_png_(self) -> bytes:
        stream = BytesIO()
        self.savefig(stream, format="png", dpi=_DPI)
        return stream.getvalue()
