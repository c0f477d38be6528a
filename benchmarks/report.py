"""Prints the table of a pytest-benchmark JSON file: medians, throughput, and the ratio to each peer.

usage: python benchmarks/report.py FILE.json [--save benchmarks/results/MACHINE-DATE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def describe_machine(info: dict) -> str:
    cpu = info.get("cpu", {})
    torch_version = info.get("fastgen", {}).get("versions", {}).get("torch", "?")
    gpu = f", {info['gpu']}" if "gpu" in info else ""
    return f"{cpu.get('brand_raw', 'unknown CPU')}, {info.get('threads', '?')} threads{gpu}, torch {torch_version}"


def name_of(entry: dict) -> str:
    return entry["fullname"].rpartition("/")[2].replace("bench_", "").replace(".py::test_", ": ")


def lines(data: dict) -> list[str]:
    out = [f"Machine: {describe_machine(data['machine_info'])}", ""]
    out += [
        "| benchmark | device | ours | throughput | peer | peer's time | peer / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in data["benchmarks"]:
        extra = entry["extra_info"]
        if "kept_bytes" in extra:
            mib = {name: f"{count / 2**20:.3g} MiB" for name, count in extra["kept_bytes"].items()}
            out.append(f"| {name_of(entry)} | | {mib['ours']} | | eager | {mib['eager']} | |")
        if "rows" not in extra:
            continue
        ours = extra["rows"]["ours"]
        spread = "{:.3g} to {:.3g}".format(*ours["quartiles_ms"])
        rate = ", ".join(f"{ours[unit]:.3g} {unit}" for unit in ("GB/s", "TFLOP/s", "Texp/s") if unit in ours)
        if "of roofline" in ours:
            rate += f", {ours['of roofline']:.0%} of the roofline"
        name = name_of(entry)
        for peer, ratio in extra["ratios"].items():
            time = extra["rows"][peer]["median_ms"]
            out.append(
                f"| {name} | {extra['device']} | {ours['median_ms']:.3g} ms ({spread}) | {rate} "
                f"| {peer} | {time:.3g} ms | {ratio:.2f} |"
            )
    return out


def summary(data: dict) -> dict:
    """Results to commit: ratios and times, machine and commit, without host name and raw rounds."""
    benchmarks = {e["fullname"]: e["extra_info"] for e in data["benchmarks"]}
    return {
        "machine": describe_machine(data["machine_info"]),
        "versions": data["machine_info"].get("fastgen", {}).get("versions", {}),
        "commit": data["commit_info"].get("id"),
        "uncommitted_changes": data["commit_info"].get("dirty"),
        "date": data["datetime"][:10],
        "benchmarks": benchmarks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON file of pytest --benchmark-json")
    parser.add_argument("--save", type=Path, help="file for the summary, to be committed")
    arguments = parser.parse_args()
    data = json.loads(arguments.file.read_text())
    print("\n".join(lines(data)))
    if arguments.save:
        arguments.save.write_text(json.dumps(summary(data), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
