"""`python -m bench.report`: the README's table, bench/README.md's and a plot per op, from bench/results/*.json.

`python -m bench.report FILE` prints one of these as one table: what ours, eager, torch.compile and a peer take.
"""

import argparse
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md"]
# The README's one table: its columns, and how many cases it has of an op.
SUMMARY, CASES = ["eager", "ours", "ours bf16"], 3


def results():
    """Every machine's measurements, GPUs first."""
    loaded = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    return sorted(loaded, key=lambda r: "driver" not in r["machine"])


def cases(result, op):
    """{case: its rows}, in the order of measurement."""
    grouped = {}
    for row in result["rows"]:
        if row["op"] == op:
            grouped.setdefault(row["case"], []).append(row)
    return grouped


def speed_up(row, rows):
    """How many times faster than eager float32 in the same run; None where that is not known."""
    eager = next((r["seconds"] for r in rows if r["implementation"] == "eager"), None)
    return eager / row["seconds"] if eager and row["seconds"] else None


def seconds(value):
    """1.23 s, 4.56 ms or 7.89 µs."""
    if value < 1e-4:
        return f"{value * 1e6:.3g} µs"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def took(row):
    """A row's time; on a GPU that of a small call as a CUDA graph, and with a cold L2, too."""
    if row["seconds"] is None:
        return "failed" if "error" in row else "out of memory"
    beside = [(name, row.get(f"{name}_seconds")) for name in ("graph", "cold")]
    beside = ", ".join(f"{name} {seconds(value)}" for name, value in beside if value)
    return seconds(row["seconds"]) + (f" ({beside})" if beside else "")


def cell(row, rows):
    """Time, speed-up over eager float32, and the fraction of the ceiling that the op is held against."""
    if row is None:
        return ""
    if row["seconds"] is None:
        return took(row)
    faster, fraction = speed_up(row, rows), of_ceiling(row)
    text = f"{took(row)}, {f'{faster:.2f}×, ' if faster else ''}{fraction:.0%}"
    return f"**{text}**" if row["implementation"].startswith("ours") else text


def of_ceiling(row):
    """The fraction of the copy's or the matrix product's rate, whichever the op is held against."""
    return row["of_copy"] if "of_copy" in row else row["of_gemm"]


def memory(rows, key):
    """Megabytes of eager and of ours."""
    found = {row["implementation"]: row[key] for row in rows if key in row}
    wanted = [found.get("eager"), found.get("ours")]
    return " / ".join("" if n is None else f"{n / 2**20:,.0f}" for n in wanted) if any(wanted) else ""


def origin(result, rows):
    """What was run, where, and the ceilings of that run: a line for each run that gave one of the rows."""
    about = ", ".join(f"{key} {value}" if key != "name" else value for key, value in result["machine"].items())
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        run = result["runs"][name]
        ops = ", ".join(f"`{op}`" for op in dict.fromkeys(row["op"] for row in rows if row["run"] == name))
        rates = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s {dtype}" for dtype, flops in run["gemm_flops"].items())
        rates = f"GEMM {rates}" + (f"; copy {copied / 1e9:.1f} GB/s" if (copied := run["copy_bytes"]) else "")
        lines.append(f"{ops}: `{run['command']}` at {run['commit']} ({run['date']}), measured ceilings {rates}.")
    return "\n".join([f"On {about}:", "", *(f"- {line}" for line in lines)])


def markdown(header, lines):
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(result, op):
    """The Markdown of one op on one machine: a row a case, a column an implementation."""
    grouped = cases(result, op)
    names = list(dict.fromkeys(row["implementation"] for rows in grouped.values() for row in rows))
    lines = []
    for case, rows in grouped.items():
        by_name = {row["implementation"]: row for row in rows}
        cells = [cell(by_name.get(name), rows) for name in names]
        lines.append([case, *cells, memory(rows, "peak_bytes"), memory(rows, "saved_bytes")])
    rows = [row for rows in grouped.values() for row in rows]
    return f"{origin(result, rows)}\n\n" + markdown(
        ["", *names, "peak MB, eager / ours", "kept for the backward"], lines
    )


def summary(result):
    """The Markdown of all ops on one machine: eager and ours, of the first cases that have both."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        found = []
        for case, rows in cases(result, op).items():
            by_name = {row["implementation"]: row for row in rows}
            cells = [cell(by_name.get(name), rows) for name in SUMMARY]
            if all(cells[:2]):
                found.append([f"`{op}` {case}", *cells, memory(rows, "peak_bytes")])
        lines += found[:CASES]
    return f"{origin(result, result['rows'])}\n\n" + markdown(["", *SUMMARY, "peak MB, eager / ours"], lines)


def plain(result):
    """All that was measured on one machine as text: a line for each case and dtype; of several "ours" the fastest."""
    lines = [("op", "shape", "dtype", "ours", "eager", "compile", "peer", "of ceiling")]
    kinds = {}
    for row in result["rows"]:
        kinds.setdefault((row["op"], row["case"], row["dtype"]), {})[row["implementation"].removesuffix(" bf16")] = row
    for (op, case, dtype), rows in kinds.items():
        ours = [row for name, row in rows.items() if name.startswith("ours")]
        best = min(ours, key=lambda row: row["seconds"] or float("inf"), default=None)
        cells = [took(rows[name]) if name in rows else "" for name in ("eager", "compile", "natten")]
        mine = share = ""
        if best:
            mine = took(best) + best["implementation"].removesuffix(" bf16").removeprefix("ours")
            share = f"{of_ceiling(best):.0%}" if best["seconds"] else ""
        lines.append((op, case, dtype, mine, *cells, share))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def render(page):
    """The page's text with what stands between `<!-- bench:op -->` or `<!-- bench -->` and `<!-- end -->` made anew."""

    def tables(match):
        op = match[2]
        found = [table(r, op) if op else summary(r) for r in results() if not op or cases(r, op)]
        return f"<!-- {match[1]} -->\n" + "\n\n".join(found) + "\n<!-- end -->"

    return re.sub(r"<!-- (bench(?::(\w+))?) -->\n.*?<!-- end -->", tables, page, flags=re.DOTALL)


def plot(op, path):
    """One panel a case: speed-up over eager float32, a bar an implementation."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = op  # the same file from the same numbers
    from matplotlib import pyplot

    panels = []
    for result in results():
        for case, rows in cases(result, op).items():
            bars = [(row["implementation"], speed_up(row, rows)) for row in rows]
            if len(bars := [bar for bar in bars if bar[1]]) > 1:
                panels.append((f"{case}\n{result['machine']['name']}", bars))
    if not panels:
        return
    heights = [len(bars) + 1.5 for _, bars in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.32 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, (title, bars) in zip(axes[:, 0], panels, strict=True):
        names, values = zip(*reversed(bars), strict=True)
        colours = ["#2a6fbb" if name.startswith("ours") else "#b8bec6" for name in names]
        drawn = axis.barh(names, values, color=colours)
        axis.bar_label(drawn, [f"{value:.2f}×" for value in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(x=0.12)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("times faster than eager float32 PyTorch, same run", fontsize=9)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, path)


def main():
    """Rewrites the pages' tables and the plots beside the results, or prints what one file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="results to print instead")
    if file := parser.parse_args().file:
        print(plain(json.loads(file.read_text())))
        return
    for page in PAGES:
        text = page.read_text()
        partial = page.with_suffix(".partial")
        partial.write_text(render(text))
        os.replace(partial, page)
        print(f"{page.relative_to(ROOT)} written")
        for op in re.findall(r"<!-- bench:(\w+) -->", text):
            plot(op, ROOT / "bench" / "results" / f"{op}.svg")
            print(f"bench/results/{op}.svg written")


if __name__ == "__main__":
    main()
