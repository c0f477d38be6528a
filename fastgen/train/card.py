"""The model card of a run: README.md beside the weights that others load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from fastgen.models import GenerativeModel
from fastgen.train.curves import read_rows
from fastgen.train.files import inside, write_whole
from fastgen.train.folder import RunFolder, story


def write_card(folder: RunFolder, model: GenerativeModel) -> None:
    """Write ``model/README.md`` from the run's folder: data, commands, metrics on held-out items.

    Raises:
        OSError: it can't be written.
    """
    card = str(model.generate_model_card(training=_training(folder)))
    write_whole(inside(folder.path, folder.pretrained.name, "README.md"), card.encode())


def _training(folder: RunFolder) -> str:
    config, environment = _read(folder.config), _read(folder.environment)
    data = str(config.get("data", ""))
    rows = read_rows(folder.metrics)
    parts = [
        f"## Training\n\nOn {_code(Path(data).name if Path(data).is_absolute() else data)}" if data else "## Training"
    ]
    if rows:
        parts[0] += f", {rows[-1]['step']:,} steps"
    if environment.get("torch"):
        parts[0] += f", with fastgen {environment.get('fastgen')} and torch {environment.get('torch')}"
    parts[0] += ". The weights are the running average over the steps." if config.get("average_decay") else "."
    commands = story(environment)
    if commands:
        parts.append("```sh\n" + "\n".join(commands).replace("```", "'''") + "\n```")
    metrics = _metrics(folder, rows)
    if metrics:
        parts.append("## Metrics\n\n| metric | value | |\n|---|---|---|\n" + "\n".join(metrics))
    return "\n\n".join(parts)


def _metrics(folder: RunFolder, rows: list[dict[str, Any]]) -> list[str]:
    """Rows of a table: the last scores on held-out items during training, and the metrics of ``fastgen evaluate``."""
    held_out = [row for row in rows if row.get("part") == "held-out"]
    lines = []
    for name, value in held_out[-1]["values"].items() if held_out else ():
        lines.append(f"| {_text(name)} | {_number(value)} | on held-out items, at step {held_out[-1]['step']:,} |")
    found = _read(folder.evaluation)
    for metric in found.get("figures") or ():
        about = ", ".join(str(metric[key]) for key in ("unit", "space") if metric.get(key))
        lines.append(
            f"| {_text(metric.get('name'))} | {_number(metric.get('value'))} |"
            f" {_text(about)}{'; ' if about else ''}by fastgen evaluate at step {found.get('step')} |"
        )
    return lines


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file of the run; {} where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and math.isfinite(value) else "not finite"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _text(given: object) -> str:
    return str(given).replace("|", "\\|").replace("\n", " ")
