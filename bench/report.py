"""`python -m bench.report` writes the tables of README.md and bench/README.md and the plots, from bench/results/*.json.

`python -m bench.report FILE` prints the results of one machine as one table: ours, eager, torch.compile and NATTEN.
"""

import argparse
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md"]
# The table of the main README: its columns and number of rows.
SUMMARY, SUMMARY_ROWS = ["eager", "ours", "ours bf16"], 5
COMMON = ("eager", "ours", "natten")  # implementations with a column of their own, by their first word


def results():
    """Returns the results of every machine, GPUs first."""
    loaded = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*.json"))]
    return sorted(loaded, key=lambda r: "driver" not in r["machine"])


def cases(result, op):
    """Returns {case: rows} of an op, in the order of measurement."""
    grouped = {}
    for row in result["rows"]:
        if row["op"] == op:
            grouped.setdefault(row["case"], []).append(row)
    return grouped


def speed_up(row, rows):
    """Returns the speed-up over eager float32 in the same run, or None if that was not measured."""
    eager = next((r["seconds"] for r in rows if r["implementation"] == "eager"), None)
    return eager / row["seconds"] if eager and row["seconds"] else None


def best_peer(row, rows):
    """Returns the fastest row of the same dtype that is not ours, or None."""
    others = [
        r for r in rows if r["dtype"] == row["dtype"] and r["seconds"] and not r["implementation"].startswith("ours")
    ]
    return min(others, key=lambda r: r["seconds"], default=None)


def seconds(value):
    """Formats a time: 1.23 s, 4.56 ms or 7.89 µs."""
    if value < 1e-4:
        return f"{value * 1e6:.3g} µs"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def took(row):
    """Formats the time of a row; of a small call on a GPU also as a CUDA graph, and with a cold L2 cache."""
    if row["seconds"] is None:
        return "failed" if "error" in row else "out of memory"
    beside = [(name, row.get(f"{name}_seconds")) for name in ("graph", "cold")]
    beside = ", ".join(f"{name} {seconds(value)}" for name, value in beside if value)
    return seconds(row["seconds"]) + (f" ({beside})" if beside else "")


def cell(row, rows):
    """Formats the time, the speed-up over eager float32 (ours: and the best peer), and the fraction of the ceiling."""
    if row is None:
        return ""
    if row["seconds"] is None:
        return took(row)
    faster, ours = speed_up(row, rows), row["implementation"].startswith("ours")
    parts = [took(row), f"{faster:.2f}×" if faster else "", f"{of_ceiling(row):.0%}"]
    if ours and (peer := best_peer(row, rows)) and peer["implementation"] != "eager":
        parts.insert(2, f"{peer['seconds'] / row['seconds']:.2f}× {peer['implementation']}")
    text = ", ".join(filter(None, parts))
    return f"**{text}**" if ours else text


def other_peers(rows):
    """Formats the rows that have no column of their own."""
    others = [row for row in rows if row["implementation"].split()[0] not in COMMON]
    return "; ".join(f"{row['implementation']} {cell(row, rows)}" for row in others)


def of_ceiling(row):
    """Returns the fraction of the measured rate of a copy or of arithmetic, whichever bounds the op."""
    return next(row[name] for name in ("of_copy", "of_peak", "of_gemm") if name in row)  # of_gemm: before 2026-11-29


def memory(rows, key):
    """Formats the megabytes of eager and of ours."""
    found = {row["implementation"]: row[key] for row in rows if key in row}
    peaks = [found.get("eager"), found.get("ours")]
    return " / ".join("" if n is None else f"{n / 2**20:,.0f}" for n in peaks) if any(peaks) else ""


def machine(result):
    """Formats the machine and the versions."""
    return ", ".join(f"{key} {value}" if key != "name" else value for key, value in result["machine"].items())


def origin(result, rows):
    """Lists the command, the commit and the ceilings of each run that the rows come from."""
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        run = result["runs"][name]
        ops = ", ".join(f"`{op}`" for op in dict.fromkeys(row["op"] for row in rows if row["run"] == name))
        label, peaks = ("", run["peak_flops"]) if "peak_flops" in run else ("GEMM ", run["gemm_flops"])
        rates = [f"{flops / 1e9:,.0f} GFLOP/s {dtype}" for dtype, flops in peaks.items()]
        rates = [label + ", ".join(rates)] if rates else []
        rates += [f"copy {copied / 1e9:.1f} GB/s"] if (copied := run["copy_bytes"]) else []
        ceilings = "; ".join(rates)
        lines.append(f"{ops}: `{run['command']}` at {run['commit']} ({run['date']}), measured ceilings {ceilings}.")
    return "\n".join([f"On {machine(result)}:", "", *(f"- {line}" for line in lines)])


def markdown(header, lines):
    """Formats a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def aligned(lines):
    """Formats lines of cells as text columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table(result, op):
    """Returns the Markdown of one op on one machine: a row per case; the peers share a column."""
    grouped = cases(result, op)
    names = list(dict.fromkeys(row["implementation"] for rows in grouped.values() for row in rows))
    names = [name for name in names if name.split()[0] in COMMON]
    lines = []
    for case, rows in grouped.items():
        by_name = {row["implementation"]: row for row in rows}
        cells = [cell(by_name.get(name), rows) for name in names]
        lines.append([case, *cells, other_peers(rows), memory(rows, "peak_bytes"), memory(rows, "saved_bytes")])
    rows = [row for rows in grouped.values() for row in rows]
    return f"{origin(result, rows)}\n\n" + markdown(
        ["", *names, "peers", "peak MB, eager / ours", "kept for the backward"], lines
    )


def summary(result):
    """Returns the Markdown of the main README: of each op the first case of eager and ours, the longest in eager."""
    found = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        for case, rows in cases(result, op).items():
            by_name = {row["implementation"]: row for row in rows}
            if speed_up(by_name.get("ours", {"seconds": None}), rows):
                found.append((f"`{op}` {case}", by_name, rows))
                break
    found = sorted(found, key=lambda entry: -entry[1]["eager"]["seconds"])[:SUMMARY_ROWS]
    lines = [
        [name, *(cell(by_name.get(column), rows) for column in SUMMARY), memory(rows, "peak_bytes")]
        for name, by_name, rows in found
    ]
    runs = [result["runs"][name] for name in dict.fromkeys(row["run"] for *_, rows in found for row in rows)]
    commits = ", ".join(dict.fromkeys(f"{run['commit']} ({run['date']})" for run in runs))
    about = (
        f"The {len(found)} benchmarks with the longest eager time, one per op or network, on {machine(result)}, at "
        f"{commits}. All cases, commands and ceilings: [bench/README.md](bench/README.md)."
    )
    return f"{about}\n\n" + markdown(["", *SUMMARY, "peak MB, eager / ours"], lines)


def plain(result):
    """Formats all results of one machine as text: a line per case and dtype, with the fastest of several "ours"."""
    lines = [("op", "shape", "dtype", "ours", "eager", "compile", "peer", "of ceiling")]
    kinds = {}
    for row in result["rows"]:
        kinds.setdefault((row["op"], row["case"], row["dtype"]), {})[row["implementation"].removesuffix(" bf16")] = row
    for (op, case, dtype), rows in kinds.items():
        ours = [row for name, row in rows.items() if name.startswith("ours")]
        best = min(ours, key=lambda row: row["seconds"] or float("inf"), default=None)
        cells = [took(rows[name]) if name in rows else "" for name in ("eager", "compile")]
        others = [row for name, row in rows.items() if not name.startswith("ours") and name not in ("eager", "compile")]
        others = sorted((row for row in others if row["seconds"]), key=lambda row: row["seconds"])
        cells.append(f"{took(others[0])} {others[0]['implementation'].removesuffix(' bf16')}" if others else "")
        mine = share = ""
        if best:
            mine = took(best) + best["implementation"].removesuffix(" bf16").removeprefix("ours")
            share = f"{of_ceiling(best):.0%}" if best["seconds"] else ""
        lines.append((op, case, dtype, mine, *cells, share))
    return aligned(lines)


def render(page):
    """Returns the page's text with new tables between `<!-- bench:op -->` or `<!-- bench -->` and `<!-- end -->`."""

    def tables(match):
        op = match[2]
        if op:
            found = [table(result, op) for result in results() if cases(result, op)]
        else:
            found = [summary(max(results(), key=lambda result: len(result["rows"])))]  # of the most complete one
        return f"<!-- {match[1]} -->\n" + "\n\n".join(found) + "\n<!-- end -->"

    return re.sub(r"<!-- (bench(?::(\w+))?) -->\n.*?<!-- end -->", tables, page, flags=re.DOTALL)


def plot(op, path):
    """Draws the speed-up over eager float32: a panel per case, a bar per implementation."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = op  # the same file from the same numbers
    from matplotlib import pyplot

    panels = []
    for result in results():
        for case, rows in cases(result, op).items():
            bars = [(row["implementation"], speed_up(row, rows)) for row in rows]
            if len(bars := [bar for bar in bars if bar[1]]) > 1:
                about = result["machine"]
                panels.append((f"{case}\n{about['name']}, {about['instruction set']}", bars))
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
    """Writes the tables of the pages and the plots, or prints the results in one file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="the results to print instead")
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
