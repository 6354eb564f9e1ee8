"""Pages that people look at: one HTML file each, which loads nothing and opens from a disk.

A page is made of sections, and these of parts: `Text`, `Preformatted`, `Table`, `Picture` and
`Curves`. All text is escaped. A browser runs the two scripts that are named here by their hashes
and no other, whatever text a page shows. The curves are drawn by Bokeh, whose JavaScript is in its
wheel; needs the packages of the extra `report`.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm import escape

# A page with so many points has about 4 MB of them. They are shared out among its curves, within
# these bounds.
MAX_POINTS = 240_000
MIN_POINTS_OF_A_CURVE, MAX_POINTS_OF_A_CURVE = 24, 900
MAX_CELLS = 20_000  # of a table; the rows behind them are left out
MAX_TEXT, MAX_CELL = 20_000, 2_000  # characters of a text, and of a cell; the rest is left out
HERE = Path(__file__).parent


# --- parts ---


class Text(NamedTuple):
    """A paragraph."""

    text: str
    mark: str = ""  # "good", "bad", "differs" or "": how it is coloured


class Preformatted(NamedTuple):
    """Text whose lines and spaces stay."""

    title: str
    text: str


class Cell(NamedTuple):
    """A cell of a table whose text is not what it is sorted by."""

    text: str
    value: float | str | None = None  # sorted by; None: by the text
    mark: str = ""  # see `Text`


class Table(NamedTuple):
    """A table. A click on a column's name sorts by it.

    A row has a `Cell`, a text, a number or None (empty) for each column. Texts are sorted as such.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str | float | None]]
    title: str = ""


class Picture(NamedTuple):
    """A picture as PNG."""

    title: str
    png: bytes


class Figure(NamedTuple):
    """Curves over one x-axis."""

    title: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y; any numbers


class Curves(NamedTuple):
    """Figures whose curves are zoomed, hovered over, and switched on and off by their names, in all
    figures at once; the y-axes are linear or logarithmic.
    """

    x_label: str
    figures: Sequence[Figure]
    others: Sequence[Figure] = ()  # shown on demand


Part = Text | Preformatted | Table | Picture | Curves


class Section(NamedTuple):
    heading: str
    parts: Sequence[Part]
    is_folded: bool = False  # it is there to be opened


# --- curves ---


def thin(x: Sequence[float], y: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out points of a curve so that it looks the same: its ends stay, and of each stretch of
    equally many points the lowest and the highest one, and the first that is not finite, if there
    is one. So a spike stays, and so does a gap.

    Args:
      most: how many points may be left, at least 5.

    Returns:
      x and y, f64 [n], in their order
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if len(y) <= most:
        return x, y

    kept = {0, len(y) - 1}
    stretches = np.array_split(np.arange(len(y)), (most - 2) // 3)
    for stretch in stretches:
        is_finite = np.isfinite(y[stretch])
        finite = stretch[is_finite]
        if len(finite):
            kept |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
        kept.update(stretch[~is_finite][:1].tolist())
    index = np.array(sorted(kept))
    return x[index], y[index]


def _points_of_a_curve(sections: Sequence[Section]) -> int:
    """How many points each curve of a page may have."""
    count = 0
    for section in sections:
        for part in section.parts:
            if isinstance(part, Curves):
                count += sum(len(figure.curves) for figure in (*part.figures, *part.others))
    most = MAX_POINTS // max(count, 1)
    return min(max(most, MIN_POINTS_OF_A_CURVE), MAX_POINTS_OF_A_CURVE)


def _json_numbers(values: np.ndarray) -> list:
    """Numbers with six digits, integers whole; None for what JSON has no number for."""
    numbers: list[float | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            numbers.append(None)
        elif value.is_integer() and abs(value) < 2**53:
            numbers.append(int(value))
        else:
            numbers.append(float(f"{value:.6g}"))
    return numbers


class _Drawn(NamedTuple):
    """`Curves` as the page's script reads them."""

    data: str  # JSON that ends no script element
    num_figures: int
    others: list[int]  # numbers of the figures that are shown on demand
    note: str  # which curves were thinned


def _drawn(curves: Curves, most: int) -> _Drawn:
    """Curves as JSON, each with at most so many points.

    Names and titles are values in it, never keys: "__proto__" is a name like any other.
    """
    figures = []
    names: dict[str, int] = {}
    longest = 0
    for figure in (*curves.figures, *curves.others):
        lines = []
        for name, (x, y) in figure.curves.items():
            longest = max(longest, len(y))
            thinned_x, thinned_y = thin(x, y, most)
            number = names.setdefault(name, len(names))
            lines.append([number, _json_numbers(thinned_x), _json_numbers(thinned_y)])
        figures.append({"title": shown(figure.title), "curves": lines})

    content = {"x": curves.x_label, "names": list(map(shown, names)), "figures": figures}
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    note = ""
    if longest > most:
        note = (
            f"Curves of more than {most:,} points are thinned (the longest has {longest:,}): of "
            "each stretch the lowest and the highest value are shown, so that spikes stay."
        )
    others = list(range(len(curves.figures), len(figures)))
    return _Drawn(data, len(figures), others, note)


# --- tables ---


def number(value: float) -> str:
    """A number in few characters; it is given with six digits at most."""
    if isinstance(value, int) and abs(value) < 1e15:
        return f"{value:,}"
    if not math.isfinite(value):
        return str(float(value))
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.4g}"


def _cell(value: Cell | str | float | None) -> Cell:
    """A table's cell as it is shown."""
    if value is None:
        return Cell("", "")
    if isinstance(value, (int, float)):
        return Cell(number(value), _sortable(value))
    if isinstance(value, str):
        return Cell(shown(value, MAX_CELL), _sortable(value))
    sorted_by = value.text if value.value is None else value.value
    return Cell(shown(value.text, MAX_CELL), _sortable(sorted_by), value.mark)


def _sortable(value: float | str) -> str:
    """What the page's script sorts by: a number behind an equals sign, a text behind a quote."""
    if isinstance(value, str):
        return f"'{shown(value[:MAX_SORTED])}" if value else ""
    return f"={float(value)!r}"


class _Fitted(NamedTuple):
    """The rows of a table that a page has room for."""

    rows: list[list[Cell]]
    title: str


def _fitted(table: Table) -> _Fitted:
    """A table's cells as they are shown, and its title, which says if rows are left out."""
    most = max(MAX_CELLS // max(len(table.columns), 1), 1)
    rows = []
    for row in table.rows[:most]:
        rows.append([_cell(value) for value in row])
    title = table.title
    if len(table.rows) > most:
        title = f"{title} The first {most:,} of {len(table.rows):,} rows.".strip()
    return _Fitted(rows, title)


MAX_SORTED = 100  # characters by which texts are sorted
SHORT = 32  # characters of a text that stays on a line


def _classes(cell: Cell) -> str:
    """The classes of a cell that is ready to be shown."""
    width = "short" if len(cell.text) <= SHORT else ""
    if str(cell.value).startswith("="):
        width = "number"
    return f"{cell.mark} {width}".strip()


# --- the page ---


def shown(text: str, most: int = MAX_TEXT) -> str:
    """A text with control characters spelt out, and cut where it is longer than `most`."""
    text = escape.printable(text)
    if len(text) > most:
        text = f"{text[:most]} [{len(text) - most:,} more characters]"
    return text


def check_installed() -> None:
    """Raises ValueError if a package that pages need is missing."""
    try:
        import bokeh.resources  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"pages need the package {error.name}: pip install -c constraints.txt -e '.[report]'"
        ) from None


def render(title: str, sections: Sequence[Section], about: str = "") -> str:
    """A page as HTML, complete in itself.

    Args:
      about: a sentence below the title.

    Raises:
      ValueError: a package is missing.
    """
    check_installed()
    import jinja2

    most = _points_of_a_curve(sections)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(kind=_kind, fitted=_fitted, classes=_classes, shown=shown)
    environment.filters.update(base64=_base64)
    environment.globals.update(drawn=lambda curves: _drawn(curves, most))

    # The parser of HTML makes \n of \r\n before it hashes a script.
    scripts = [(HERE / "page.js").read_text().replace("\r\n", "\n")]
    if any(isinstance(part, Curves) for section in sections for part in section.parts):
        scripts.insert(0, _bokeh())
    html = environment.from_string((HERE / "page.html").read_text()).render(
        title=title,
        about=about,
        sections=sections,
        style=(HERE / "page.css").read_text(),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
    )
    # JSON may hold halves of a surrogate pair, which no encoding has.
    return html.encode("utf-8", "backslashreplace").decode()


def _kind(part: Part) -> str:
    return type(part).__name__


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bokeh() -> str:
    """Bokeh's JavaScript."""
    from bokeh.resources import Resources

    library = Resources(mode="inline", components=["bokeh", "bokeh-api"], minified=True)
    script = "\n".join(library.js_raw).replace("\r\n", "\n")
    assert "</script" not in script.lower()
    return script


def _hash(script: str) -> str:
    """What a Content-Security-Policy calls a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
