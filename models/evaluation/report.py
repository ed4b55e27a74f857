"""Tables and a plot of an evaluation's results."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .run import Results, Row

# Column: (heading, format, whether higher is better)
COLUMNS = {
    "psnr": ("PSNR, dB ↑", ".2f"),
    "psnr_holes": ("PSNR in holes, dB ↑", ".2f"),
    "ssim": ("SSIM ↑", ".4f"),
    "l1": ("L1 ↓", ".4f"),
    "lpips": ("LPIPS ↓", ".4f"),
    "fid": ("FID ↓", ".2f"),
}


class Line(NamedTuple):
    """Means over pictures. case, area, method: what they are of, "" if there is one only; pictures: their number."""

    case: str
    area: str
    method: str
    pictures: int
    values: dict[str, float]


def overall(results: Results) -> list[Line]:
    """Returns the means over all pictures for each case and method."""
    lines = []
    for (case, method), rows in _grouped(results.rows, lambda row: (row.case, row.method)):
        values = _means(rows)
        if (case, method) in results.fid:
            values["fid"] = results.fid[case, method]
        lines.append(Line(case, "", method, len(rows), values))
    return lines


def by_area(results: Results, bins: int = 10) -> list[Line]:
    """Returns the means for each range of the masks' areas, in order; empty if there are no masks.

    Args:
        results: of `evaluate`.
        bins: ranges of one width between 0 and 100 %; those without a mask are left out.
    """
    rows = [row for row in results.rows if not math.isnan(row.share)]

    def key(row: Row) -> tuple[str, int, str]:
        return row.case, min(int(row.share * bins), bins - 1), row.method

    grouped = _grouped(rows, key)
    order = list(dict.fromkeys(row.case for row in rows))
    grouped.sort(key=lambda entry: (order.index(entry[0][0]), entry[0][1]))
    step = 100 / bins
    return [
        Line(case, f"{step * area:g}–{step * (area + 1):g} %", method, len(found), _means(found))
        for (case, area, method), found in grouped
    ]


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by a key, in the order in which the keys appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Of each metric, without pictures for which it is not defined."""
    values: dict[str, float] = {}
    for name in rows[0].values:
        defined = [row.values[name] for row in rows if not math.isnan(row.values[name])]
        values[name] = sum(defined) / len(defined) if defined else math.nan
    return values


def markdown(lines: Sequence[Line]) -> str:
    """Returns a table in Markdown, aligned also as plain text."""
    names = _columns(lines)
    labels = [name for name in ("case", "area") if any(getattr(line, name) for line in lines)]
    heads = [*({"case": "setting", "area": "missing"}[name] for name in labels), "method"]
    table = [[*heads, *(COLUMNS[name][0] for name in names), "pictures"]]
    for line in lines:
        numbers = (format(line.values.get(name, math.nan), COLUMNS[name][1]) for name in names)
        texts = [
            *(getattr(line, name) for name in labels),
            line.method.replace("|", "\\|"),
            *numbers,
            str(line.pictures),
        ]
        table.append(["–" if text == "nan" else text for text in texts])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = len(heads)
    rows = [
        " | ".join(
            text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])]) + "\n"


def document(results: Results, about: Sequence[str], bins: int = 10) -> str:
    """Returns the tables in Markdown below some lines of text: of all pictures, and by the masks' areas."""
    parts = ["\n".join(about), markdown(overall(results)).rstrip()]
    areas = by_area(results, bins)
    if len({line.area for line in areas}) > 1:
        parts.append(markdown(areas).rstrip())
    return "\n\n".join(parts) + "\n"


def _columns(lines: Sequence[Line]) -> list[str]:
    return [name for name in COLUMNS if any(name in line.values for line in lines)]


def pictures_csv(results: Results) -> str:
    """Returns a CSV file with one row for each picture and method; share: of missing pixels."""
    names = [name for name in COLUMNS if any(name in row.values for row in results.rows)]
    rows = ([r.case, r.method, r.picture, _cell(r.share), *(_cell(r.values[n]) for n in names)] for r in results.rows)
    return _csv(["case", "method", "picture", "share", *names], rows)


def table_csv(lines: Sequence[Line]) -> str:
    """Returns a CSV file with one row for each line of a table."""
    names = _columns(lines)
    rows = ([*line[:4], *(_cell(line.values.get(name, math.nan)) for name in names)] for line in lines)
    return _csv(["case", "area", "method", "pictures", *names], rows)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def plot(results: Results, bins: int = 10) -> bytes:
    """Returns a PNG file: PSNR over the cases, else over the masks' areas, else of each picture.

    In holes if there are masks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'inr-kernels[evaluate]'") from error
    lines, areas = overall(results), by_area(results, bins)
    metric = "psnr_holes" if any("psnr_holes" in line.values for line in lines) else "psnr"
    methods = list(dict.fromkeys(line.method for line in lines))
    cases = list(dict.fromkeys(line.case for line in lines))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ranges = list(dict.fromkeys(line.area for line in areas))
    if len(cases) > 1 or len(ranges) > 1:
        over_cases = len(cases) > 1
        x = cases if over_cases else ranges
        for method in methods:
            shown = lines if over_cases else areas
            found = {
                (line.case if over_cases else line.area): line.values[metric] for line in shown if line.method == method
            }
            axes.plot(x, [found.get(label, math.nan) for label in x], marker="o", label=method)
        axes.set_xlabel("setting" if over_cases else "missing pixels")
        axes.set_ylabel(COLUMNS[metric][0].rstrip(" ↑"))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper")
    else:
        for i, method in enumerate(methods):
            values = [row.values[metric] for row in results.rows if row.method == method]
            axes.plot(values, [i] * len(values), "o", alpha=0.4, markeredgewidth=0)
            mean = lines[i].values[metric]
            axes.plot([mean], [i], "k|", markersize=20, markeredgewidth=2)
            if math.isfinite(mean):
                axes.annotate(f"{mean:.2f}", (mean, i), (0, 14), textcoords="offset points", ha="center")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.7)
        axes.set_xlabel(COLUMNS[metric][0].rstrip(" ↑") + ": each picture, and the mean")
        axes.grid(alpha=0.3, axis="x")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
