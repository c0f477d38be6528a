"""The report: one self-contained page with samples over time, curves, metrics and settings of a run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fastgen.train.curves import DARK, HELD_OUT, LIGHT, UNITS, describe, draw_panel, panels, read_rows
from fastgen.train.files import inside, write_whole
from fastgen.train.folder import story
from fastgen.train.progress import duration
from fastgen.train.sample_history import data_uri, read_samples

TEMPLATE = Path(__file__).with_name("report.html.j2")
HEADLINES = 3
REAL_AGAINST_REAL = ", real against real"  # end of the names of metrics that compare training with held-out data
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

SLIDER = """\
for (const history of document.querySelectorAll(".history")) {
  const frames = [...history.querySelectorAll(".frame")].reverse();
  if (frames.length < 2) continue;
  const slider = history.querySelector("input"), step = history.querySelector("output");
  const update = () => {
    frames.forEach((frame, place) => {
      frame.classList.toggle("on", place === +slider.value);
      if (place !== +slider.value) frame.querySelectorAll("audio").forEach((audio) => audio.pause());
    });
    step.textContent = "step " + frames[slider.value].dataset.step;
    slider.setAttribute("aria-valuetext", step.textContent);
  };
  slider.max = slider.value = frames.length - 1;
  slider.addEventListener("input", update);
  history.classList.add("slides");
  update();
}
"""


class Tile(NamedTuple):
    """A number of the summary."""

    name: str
    value: str
    note: str = ""


class Chart(NamedTuple):
    name: str
    explanation: str
    description: str
    light: str
    dark: str


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, from those files of a run (``RunFolder``) that exist.

    The page loads nothing: images, audio and styles are embedded. Files that can't be read are listed on it.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the page can't be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a run's folder, got no folder")
    path = inside(folder, "report.html")
    write_whole(path, _page(folder).encode("utf-8", errors="replace"))
    return path


def _page(folder: Path) -> str:
    from jinja2 import Environment, StrictUndefined

    problems: list[str] = []
    config = _read(folder / "config.yaml", problems)
    environment = _read(folder / "environment.json", problems)
    evaluation = _read(folder / "evaluation.json", problems)
    rows = read_rows(folder / "metrics.jsonl")
    shown = panels(rows)
    metrics = [metric for metric in _list(evaluation.get("figures")) if isinstance(metric, Mapping)]
    commands = _commands(folder, environment)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        folder=folder.resolve().name,
        model=_model(config, environment, commands) or folder.resolve().name,
        data=_name(config.get("data")),
        started=_date(environment.get("started")),
        tiles=_tiles(folder, rows, environment, metrics),
        samples=read_samples(folder),
        charts=[
            Chart(
                panel.title,
                panel.explanation,
                describe(panel),
                *(data_uri("image/png", draw_panel(panel, theme)) for theme in (LIGHT, DARK)),
            )
            for panel in shown
        ],
        metrics=[_metric(metric) for metric in metrics],
        evaluated_step=_value(evaluation["step"]) if "step" in evaluation else "",
        evaluate=f"fastgen evaluate {_address(folder)}",
        config=list(_flat(config)),
        environment=[(name, value) for name, value in _flat(_about(environment)) if name not in ("command", "format")],
        command="\n".join(story(environment) or commands[:1]),
        problems=problems,
        script=SLIDER,
        script_hash=base64.b64encode(hashlib.sha256(SLIDER.encode()).digest()).decode("ascii"),
    )


# --------------------------------------------------------------------------------------------------
# Files of the run


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; {} if there is none, and a line in ``problems`` if it can't be read."""
    if not path.is_file() or path.is_symlink():
        return {}
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name}: can't be read: {' '.join(str(error).split())}")
        return {}
    if found is None:
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name}: expected settings by name, got {type(found).__name__}")
        return {}
    return found


def _commands(folder: Path, environment: Mapping[str, Any]) -> list[str]:
    """The command that was given, and the one in the first comment of config.yaml."""
    given = environment.get("command")
    found = [shlex.join(str(word) for word in given) if isinstance(given, list) else str(given)] if given else []
    path = folder / "config.yaml"
    if path.is_file() and not path.is_symlink():
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline(10_000).strip()
        found += [first.removeprefix("# ")] if first.startswith("# fastgen ") else []
    return found


def _about(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment, in which resumed trainings are reduced to their start times."""
    when = [turn.get("started") if isinstance(turn, Mapping) else turn for turn in _list(environment.get("resumed"))]
    return {**environment, "resumed": when} if when else dict(environment)


def _model(config: Mapping[str, Any], environment: Mapping[str, Any], commands: list[str]) -> str:
    """The model's name; "model" in config.yaml may hold its options instead."""
    for given in (config.get("model"), environment.get("model")):
        if isinstance(given, str):
            return given
    in_commands = (re.search(r"\bfastgen train ([\w./:-]+)", command) for command in commands)
    return next((match[1].rpartition("/")[2] for match in in_commands if match), "")


def _name(given: object) -> str:
    """A name, given as a string, or under "name" or "source" of a mapping."""
    if isinstance(given, Mapping):
        return _name(given.get("name")) or _name(given.get("source"))
    return given if isinstance(given, str) else ""


def _address(folder: Path) -> str:
    """The folder as an argument of a command, without absolute paths of this machine."""
    return shlex.quote(folder.name if folder.is_absolute() else folder.as_posix())


def _parameters(folder: Path, environment: Mapping[str, Any]) -> int | None:
    """Number of parameters: from the environment, else from the saved model."""
    if isinstance(environment.get("parameters"), int):
        return int(environment["parameters"])
    path = folder / "model" / "model.safetensors"
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes: list[list[int]] = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
            return sum(math.prod(shape) for shape in shapes)
    except (OSError, SafetensorError):
        return None


# --------------------------------------------------------------------------------------------------
# Texts of the page


def _tiles(
    folder: Path, rows: list[dict[str, Any]], environment: Mapping[str, Any], metrics: list[Mapping[str, Any]]
) -> list[Tile]:
    """The summary line. Rows' seconds count from the start of the run."""
    tiles = []
    if rows:
        epoch = rows[-1].get("epoch")
        tiles.append(Tile("steps", _value(rows[-1]["step"]), f"epoch {_value(epoch)}" if epoch is not None else ""))
        seconds = max(
            (float(row["seconds"]) for row in rows if isinstance(row.get("seconds"), (int, float))), default=0
        )
        speeds = [row["items_per_second"] for row in rows if isinstance(row.get("items_per_second"), (int, float))]
        if 0 < seconds < math.inf:
            note = f"{_value(speeds[-1], 3)} items per second" if speeds else ""
            tiles.append(Tile("training", duration(seconds), note))
    parameters = _parameters(folder, environment)
    if parameters is not None:
        tiles.append(Tile("parameters", _value(parameters)))
    if metrics:
        of_model = [metric for metric in metrics if not _compares_data(metric)]
        shown = [_metric(metric) for metric in of_model[:HEADLINES]]
        baseline = {
            str(metric.get("name")): _value(metric.get("value")) for metric in metrics if _compares_data(metric)
        }
        return tiles + [_metric_tile(each, baseline.get(each["name"] + REAL_AGAINST_REAL, "")) for each in shown]
    last: dict[str, tuple[Any, Any]] = {}
    for row in rows:
        if row.get("part") == HELD_OUT:
            last |= {str(name): (value, row["step"]) for name, value in row["values"].items()}
    return tiles + [
        Tile(f"held-out {name}", _value(value), _joined(UNITS.get(name, ""), f"at step {_value(step)}"))
        for name, (value, step) in list(last.items())[:HEADLINES]
    ]


def _metric_tile(metric: Mapping[str, str], baseline: str) -> Tile:
    """baseline: the same of real images, against other real images."""
    real = f"real images {baseline}" if baseline else ""
    return Tile(metric["name"], metric["value"], _joined(metric["unit"], metric["interval"], real))


def _metric(metric: Mapping[str, Any]) -> dict[str, str]:
    """A metric of evaluation.json, formatted."""
    low, high = metric.get("low"), metric.get("high")
    texts = {name: str(metric.get(name) or "") for name in ("name", "unit", "space", "note")}
    interval = f"{_value(low)} to {_value(high)}" if low is not None and high is not None else ""
    return texts | {"value": _value(metric.get("value")), "interval": interval, "n": _items(metric.get("n"))}


def _compares_data(metric: Mapping[str, Any]) -> bool:
    """Whether a metric compares training with held-out data, as a reference for the other metrics."""
    counts = metric.get("n")
    return isinstance(counts, Mapping) and "training" in counts


def _items(counts: object) -> str:
    """{"generated": 1000, "held-out": 359} as "1,000 generated, 359 held-out"."""
    if isinstance(counts, Mapping):
        return ", ".join(f"{_value(count)} {what}" for what, count in counts.items())
    return _value(counts)


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(_value(entry, 10) for entry in value) or DASH
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: object) -> str:
    """A setting as it is typed on the command line."""
    if value is None or value == "" or value == {}:
        return DASH
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(value: object, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, integers with all digits."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return _plain(value) if isinstance(value, bool) else f"{int(value):,}".replace("-", MINUS)
    if not isinstance(value, float):
        return _plain(value)
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    text = f"{size:,.0f}" if size >= 10**digits else f"{size:.{digits}g}"
    return MINUS * (value < 0) + text


def _date(given: object) -> str:
    """An ISO date as "21 November 2026, 15:10"; any other string unchanged."""
    try:
        started = datetime.fromisoformat(str(given))
    except ValueError:
        return _name(given)
    return f"{started.day} {started:%B %Y, %H:%M}"


def _joined(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _list(given: object) -> list[Any]:
    return given if isinstance(given, list) else []
