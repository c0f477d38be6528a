"""Curves of a run's metrics: a panel for each quantity, training and held-out together."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastgen.train.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Values: TypeAlias = NDArray[np.float64]

TRAIN, HELD_OUT = "train", "held-out"
UNITS = {"nll": "nats", "kl": "nats", "elbo": "nats", "items per second": "1/s"}
SPEED = "items per second"

EXPLAINED = {
    "loss": "What a step of training lowers. The losses of a GAN's networks oppose each other: neither has to fall.",
    "nll": "Negative log-likelihood of an item, given its latent where there is one. Lower is better.",
    "kl": "KL divergence of the latents from their prior. Near 0, the latents carry no information.",
    "elbo": "A lower bound of the log-likelihood of an item. Higher is better.",
    "real": "Mean score of real items by the discriminator.",
    "fake": "Mean score of generated items. Far below that of real items, the discriminator tells both apart.",
    "penalty": "Gradient penalty, before its weight. It grows many times over when training diverges.",
    "cycle": "Absolute error of images that were translated there and back.",
    "cycle error": "Absolute error of images that were translated there and back. Lower is better.",
    "identity": "Absolute error of images that already are of the style they are translated to.",
    "identity error": "Absolute error of images that already are of the style they are translated to.",
    "l1": "Mean absolute error of translations. Lower is better.",
    "distance": "Squared distance of the encoder's outputs from the codes chosen for them.",
    "perplexity": "Perplexity of the codes: about the number of codes in use.",
    "codebook perplexity": "Perplexity of the codes: about the number of codes in use.",
    "squared error": "Squared error of reconstructions. Lower is better.",
    "accuracy": "Share of tokens that are predicted correctly. Higher is better.",
    "exact": "Share of sequences that are predicted correctly as a whole. Higher is better.",
    "nats per token": "Negative log-likelihood of a token, given those before it. Lower is better.",
    "nats per character": "Negative log-likelihood of the tokens, per character of text. Lower is better.",
    "Frechet distance": "Distance of samples from held-out images, in features of the data. Lower is better.",
    SPEED: "Training items per second, without evaluation and samples.",
}
"""What a curve shows, in a sentence or two, by the name of its panel."""

MOST_PANELS = 24
MOST_CURVES = 8  # in a panel
MOST_POINTS = 1000  # of a curve; longer ones are plotted as ranges of so many bins
SMOOTHED_SHARE = 0.03  # of a curve's length, over which it is averaged
LOGARITHMIC_FROM = 30.0  # largest over smallest value
FAR_OUT = 3.0  # the axis shows 98 % of the values where all of them span more than this times their range
LONGEST_NAME = 40
PANEL, DPI = (3.7, 2.4), 200  # inches; dots in an inch


@dataclass(frozen=True)
class Curve:
    """One quantity of one part of the data: values (n,) at steps (n,), not all of them finite."""

    name: str
    part: str
    steps: Values
    values: Values


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity. last_step: the last step of the run."""

    name: str
    unit: str
    last_step: float
    curves: list[Curve]

    @property
    def explanation(self) -> str:
        """A sentence or two for the report; empty for quantities that are not fastgen's."""
        return EXPLAINED.get(self.name, "")

    @property
    def title(self) -> str:
        parts = {curve.part for curve in self.curves}
        return _short(self.name) + (f", {HELD_OUT}" if parts == {HELD_OUT} else "")


@dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str
    alarm: str
    colors: tuple[str, ...]


LIGHT = Theme(
    "#4a5058", "#dcdedb", "#ffffff", "#c8102e", ("#2f5bd0", "#d9730d", "#12805c", "#9333a8", "#b08900", "#0e7c9b")
)
DARK = Theme(
    "#b4bac3", "#343a42", "#171a1f", "#ff6b7d", ("#86a8ff", "#ffab5e", "#5fd0a5", "#d490e6", "#e3c34d", "#6ccbe6")
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if there is no file. Invalid lines are left out."""
    if not path.is_file():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_row(row):
                rows.append(row)
    return rows


def panels(rows: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels of a metrics.jsonl: the loss first, the throughput last.

    "discriminator/loss" and "generator/loss" share the panel "loss"; training and held-out "kl" share another.
    """
    found: dict[str, dict[tuple[str, str], tuple[list[float], list[float]]]] = {}
    for row in filter(_is_row, rows):
        step, part = float(row["step"]), str(row.get("part", TRAIN))
        quantities = dict(row["values"])
        if "items_per_second" in row:
            quantities[SPEED] = row["items_per_second"]
        for name, raw in quantities.items():
            value = _number(raw)
            if value is None:
                continue
            owner, _, quantity = str(name).rpartition("/")
            steps, values = found.setdefault(quantity, {}).setdefault((owner, part), ([], []))
            steps.append(step)
            values.append(value)
    last = max((curve[0][-1] for curves in found.values() for curve in curves.values()), default=0.0)
    order = sorted(found, key=lambda name: (name == SPEED, name != "loss"))
    shown = []
    for name in order[:MOST_PANELS]:
        curves = [Curve(*key, np.array(steps), np.array(values)) for key, (steps, values) in found[name].items()]
        curves.sort(key=lambda curve: curve.part != TRAIN)
        shown.append(Panel(name, UNITS.get(name, ""), last, curves[:MOST_CURVES]))
    return shown


def write_curves(path: Path, rows: Iterable[Mapping[str, Any]], theme: Theme = LIGHT) -> None:
    """Write a PNG of all panels of the rows of a metrics.jsonl, two or three in a row.

    Where a value is NaN or infinite the curve has a gap, and a cross below marks the step.
    """
    write_whole(path, _image(panels(rows), theme))


def draw_panel(panel: Panel, theme: Theme) -> bytes:
    """A PNG of one panel, without its name."""
    return _image([panel], theme, titled=False)


def describe(panel: Panel) -> str:
    """The last values of a panel, as alternative text."""
    ends = [f"{_label(curve, panel)} {curve.values[-1]:.4g} at step {curve.steps[-1]:,.0f}" for curve in panel.curves]
    return f"{panel.name}: " + ", ".join(ends)


# --------------------------------------------------------------------------------------------------
# Plotting


def _image(shown: Sequence[Panel], theme: Theme, titled: bool = True) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, math.ceil(math.sqrt(len(shown)))) if len(shown) < 7 else 3
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=DPI, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    for place, panel in enumerate(shown, 1):
        _draw(figure.add_subplot(rows, columns, place), panel, theme, titled)
    if not shown:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color=theme.ink)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, theme: Theme, titled: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor(theme.paper)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.ink, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if panel.last_step > 0:
        axes.set_xlim(-0.02 * panel.last_step, 1.02 * panel.last_step)
    axes.set_xlabel("steps", fontsize=8, color=theme.ink)
    axes.set_ylabel(panel.unit, fontsize=8, color=theme.ink)
    if titled:
        axes.set_title(panel.title, fontsize=10, color=theme.ink, loc="left", parse_math=False)
    finite = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in panel.curves])
    _scale(axes, finite)
    for place, curve in enumerate(panel.curves):
        _plot(axes, curve, theme.colors[place % len(theme.colors)], theme.alarm, _label(curve, panel))
    if len(panel.curves) > 1:
        legend = axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink, handlelength=1.4)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _scale(axes: Axes, finite: Values) -> None:
    """Logarithmic where positive values span decades; outliers are cut off."""
    if len(finite) == 0:
        return
    low, high = finite.min(), finite.max()
    if low > 0 and high / low > LOGARITHMIC_FROM:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    near_low, near_high = np.quantile(finite, [0.01, 0.99])
    room = near_high - near_low
    if high - low > FAR_OUT * room > 0:
        axes.set_ylim(max(low, near_low - room / 4), min(high, near_high + room / 4))


def _plot(axes: Axes, curve: Curve, color: str, alarm: str, label: str) -> None:
    """The raw curve, pale, under the smoothed one; held-out curves are dashed, with markers."""
    broken = curve.steps[~np.isfinite(curve.values)]
    steps, low, high, middle = _bins(curve.steps, np.where(np.isfinite(curve.values), curve.values, np.nan))
    held_out = curve.part != TRAIN
    few = len(steps) < 40
    if held_out or few:
        (line,) = axes.plot(steps, middle, color=color, linewidth=1.4, linestyle="--" if held_out else "-", label=label)
        if few:
            line.set_marker("o")
            line.set_markersize(3)
    else:
        if len(steps) < len(curve.steps):
            axes.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)
        else:
            axes.plot(steps, middle, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smoothed(middle), color=color, linewidth=1.6, label=label)
    if len(broken):
        thinned = broken[:: math.ceil(len(broken) / 100)]
        axes.plot(
            thinned,
            np.full(len(thinned), 0.03),
            "x",
            color=alarm,
            markersize=4,
            transform=axes.get_xaxis_transform(),
            label=f"{label}: not finite",
        )


def _bins(steps: Values, values: Values) -> tuple[Values, Values, Values, Values]:
    """(n,) -> at most ``MOST_POINTS`` steps with the lowest, highest and mean value of each; NaN for empty bins."""
    size = math.ceil(len(steps) / MOST_POINTS)
    if size == 1:
        return steps, values, values, values
    padding = (0, -len(steps) % size)
    steps = np.pad(steps, padding, mode="edge").reshape(-1, size)
    values = np.pad(values, padding, constant_values=np.nan).reshape(-1, size)
    there = np.isfinite(values)
    counts = there.sum(1)
    none = counts == 0
    low = np.where(none, np.nan, np.where(there, values, np.inf).min(1))
    high = np.where(none, np.nan, np.where(there, values, -np.inf).max(1))
    return steps.mean(1), low, high, np.where(none, np.nan, np.where(there, values, 0).sum(1) / np.maximum(counts, 1))


def _smoothed(values: Values) -> Values:
    """The mean over a window around each value; NaN stays NaN and is ignored in the windows of other values."""
    window = max(3, 2 * int(len(values) * SMOOTHED_SHARE / 2) + 1)
    there = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(there, values, 0.0), ones, mode="same")
    count = np.convolve(there.astype(np.float64), ones, mode="same")
    return np.where(there, total / np.maximum(count, 1), np.nan)


# --------------------------------------------------------------------------------------------------
# Values and labels


def _is_row(row: Any) -> bool:
    if not isinstance(row, Mapping) or not isinstance(row.get("values"), Mapping):
        return False
    step = _number(row.get("step"))
    return step is not None and math.isfinite(step)


def _number(raw: object) -> float | None:
    """A float, maybe not finite; None for other types."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    try:
        return float(raw)
    except OverflowError:
        return math.inf if raw > 0 else -math.inf


def _label(curve: Curve, panel: Panel) -> str:
    """The label that distinguishes the curve from the others of its panel."""
    owners, parts = ({getattr(other, what) for other in panel.curves} for what in ("name", "part"))
    words = [curve.name] if len(owners) > 1 and curve.name else []
    if len(parts) > 1 or not words:
        words.append(curve.part)
    return _short(", ".join(words)).lstrip("_") or "value"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
