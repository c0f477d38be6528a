"""Prints the tables of a session's results.

usage: python -m benchmarks.gpu.report FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the machine, correctness, attention, the rest, training."""
    out = []
    if any(row.get("rehearsal") for row in rows):
        out += ["**A rehearsal without a GPU: these are no measurements of the kernels.**", ""]
    machines = [row for row in rows if row["kind"] == "machine"]
    if machines:
        versions = ", ".join(f"{name} {version}" for name, version in machines[-1]["versions"].items() if version)
        out += [f"Machine: {machines[-1].get('gpu', 'no GPU')}, {machines[-1].get('cores')} cores, {versions}", ""]
    for row in rows:
        if row["kind"] == "build":
            how = f"prebuilt, {row['prebuilt']}" if row["prebuilt"] else "built"
            out += [f"Libraries: {how}, {row['seconds']} s", ""]
    processes = [row for row in rows if row["kind"] == "process"]
    if processes:
        out += ["| family | passed | seconds |", "|---|---|---|"]
        out += [
            f"| {one['family']} | {'yes' if one['passed'] else '**no**'} | {one.get('seconds', '')} |"
            for one in processes
        ]
        out.append("")
    timed = [row for row in rows if row["kind"] in ("attention", "rest")]
    if timed:
        out += ["| what | ours, us (quartiles) | roofline | predicted, us | peer / ours |", "|---|---|---|---|---|"]
    for row in timed:
        name = row.get("case") or f"{row.get('pass', '')} {row.get('shape', '')}"
        mine = row.get("rows", {}).get("ours", {})
        if "median_us" not in mine:
            out.append(f"| {name} | {mine.get('problem') or row.get('problem', '')} | | | |")
            continue
        peers = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratios"].items())
        share = f"{row['of_roofline']:.0%}" if "of_roofline" in row else ""
        low, high = mine["quartiles_us"]
        out.append(
            f"| {name} | {mine['median_us']:g} ({low:g} to {high:g}) | {share} | {row.get('predicted_us', '')}"
            f" | {peers} |"
        )
    for row in rows:
        if row["kind"] == "training":
            outcome = row.get("note") or ("passed" if row["passed"] else "failed")
            out += ["", f"Training {row['model']}: {outcome}, {row.get('seconds', 0)} s, {row.get('last')}"]
        if row["kind"] == "left out":
            out += ["", f"Left out for lack of time: {row['what']}"]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    text = (parser.parse_args().folder / "results.jsonl").read_text()
    print("\n".join(lines([json.loads(line) for line in text.splitlines()])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
