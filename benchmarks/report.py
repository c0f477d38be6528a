"""Prints the table of a pytest-benchmark JSON file: medians, throughput, and the ratio to each peer.

usage: python benchmarks/report.py FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def describe_machine(info: dict) -> str:
    cpu = info.get("cpu", {})
    torch_version = info.get("fastgen", {}).get("versions", {}).get("torch", "?")
    gpu = f", {info['gpu']}" if "gpu" in info else ""
    return f"{cpu.get('brand_raw', 'unknown CPU')}, {info.get('threads', '?')} threads{gpu}, torch {torch_version}"


def lines(data: dict) -> list[str]:
    out = [f"Machine: {describe_machine(data['machine_info'])}", ""]
    out += [
        "| benchmark | device | ours | throughput | peer | peer's time | peer / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in data["benchmarks"]:
        extra = entry["extra_info"]
        if "rows" not in extra:
            continue
        ours = extra["rows"]["ours"]
        spread = "{:.3g} to {:.3g}".format(*ours["quartiles_ms"])
        rate = next((f"{ours[unit]:.3g} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in ours), "")
        name = entry["fullname"].rpartition("/")[2].replace("bench_", "").replace(".py::test_", ": ")
        for peer, ratio in extra["ratios"].items():
            time = extra["rows"][peer]["median_ms"]
            out.append(
                f"| {name} | {extra['device']} | {ours['median_ms']:.3g} ms ({spread}) | {rate} "
                f"| {peer} | {time:.3g} ms | {ratio:.2f} |"
            )
    return out


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
