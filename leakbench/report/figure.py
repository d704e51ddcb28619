"""What all figures share: their colours and markers, labels as plain text, and files of the same bytes each time."""

import warnings
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The colours of lines and points, in order: Okabe and Ito's, which readers with colour blindness can tell apart."""

MARKERS = "osD^vPX*"
"""The markers of points, in order."""

INK, GREY, ORANGE, RED = "#1a1c20", "#5b5b5b", "#d55e00", "#c40000"
"""The colours of text, of rules and floors, of the main values, and of failures."""

SHARE_TICKS = ([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
"""The places and labels of an axis of shares."""

LETTER = 0.068
"""The width in inches of a letter of 8 points, by which figures leave room for their labels."""

RISE, RUN = 0.58, 0.82
"""The height and the width of a label that is turned by 35 degrees, as shares of its length."""

_SETTINGS: Any = {"svg.hashsalt": "leakbench", "svg.fonttype": "path", "pdf.fonttype": 42, "font.family": "DejaVu Sans"}
_UNDATED: Any = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Drawing(Figure):
    """A figure that a notebook shows by itself; pyplot is not needed."""

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, which a notebook shows."""
        return saved(self)


def saved(drawn: Figure, kind: str = "png") -> bytes:
    """Return a figure as a file: the same bytes for the same figure, without a date.

    Args:
        drawn: the figure.
        kind: ``png``, ``pdf`` or ``svg``.
    """
    stream = BytesIO()
    FigureCanvasAgg(drawn)
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that the font lacks becomes a box
        drawn.savefig(stream, format=kind, metadata=_UNDATED[kind], dpi=drawn.dpi)
    return stream.getvalue()


def plain(text: str, longest: int = 240) -> str:
    """Return text as a label shows it, without formulas, and cut if it is long."""
    return spelled(text, longest).replace("$", r"\$")


def spelled(text: str, longest: int = 240) -> str:
    """Return text, cut if it is long, with letters that cannot be printed as escapes."""
    cut = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def bars(value: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return [2, N] lengths of error bars below and above values [N]; 0 if an end of the interval is undefined."""
    middle = np.atleast_1d(np.asarray(value, dtype=np.float64))
    below, above = middle - np.atleast_1d(low), np.atleast_1d(high) - middle
    return np.nan_to_num(np.stack([below, above])).clip(min=0)


def style(place: int) -> dict[str, Any]:
    """Return colour and marker of the line or point number ``place``, such that the first 48 differ."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def key_below(drawn: Figure, panels: Any, columns: int = 4) -> None:
    """Put the key of the lines and points of one panel, or of an array of panels, below the whole figure."""
    found = {label: handle for one in np.ravel(panels) for handle, label in zip(*one.get_legend_handles_labels())}
    if found:
        drawn.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)), fontsize=9
        )
