"""Trains the models of the zoo with their defaults, evaluates them, and writes docs/models.md.

usage: python benchmarks/zoo.py [NAME ...] [--render | --pictures]

Each entry runs the commands of a user: ``fastgen train``, ``evaluate`` and ``sample``. The results are written to
benchmarks/results/zoo.json, one record per entry, with commit and machine; records of other entries are kept.
--render writes the page from the records and trains nothing; --pictures first makes the pictures again, of runs that
are still there. Entries named "mnist ..." and "emoji ..." read data/mnist
and data/emoji, which are not part of the project: docs/data.md says how to get them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "models.md"
IMAGES = ROOT / "docs" / "models"
RUNS = ROOT / "runs" / "zoo"
EXCERPT = 420


@dataclass(frozen=True)
class Entry:
    """A model and how it is trained for the page.

    show: metrics of ``fastgen evaluate``, in order of importance. folder: folder of the run whose last image is on the
    page, instead of one from ``fastgen sample``. views: further pictures, a caption and options of ``fastgen sample``.
    note: a reference for the metrics.
    """

    model: str
    train: tuple[str, ...] = ()
    sample: tuple[str, ...] = ("--n", "64")
    show: tuple[str, ...] = ()
    name: str = ""
    folder: str = ""
    views: tuple[tuple[str, tuple[str, ...]], ...] = ()
    note: str = ""

    @property
    def key(self) -> str:
        return self.name or self.model


DISTANCES = ("Frechet distance", "precision", "recall", "closer to training data than held-out images")
CLASSES = (*DISTANCES, "class agreement")
CODES = ("ELBO", "bits per dimension", *DISTANCES)
PIXELS = ("negative log-likelihood", "bits per dimension", *DISTANCES)
BOUNDS = ("ELBO", "importance-weighted bound", "bits per dimension", *DISTANCES)
SOUNDS = ("nats per token", "energy at harmonics", "energy at harmonics, held-out sounds")
TRANSLATED = (
    *("absolute error", "absolute error, input as it is"),
    *("structural similarity", "structural similarity, input as it is"),
)


COPIES = (
    "Samples (upper rows) above the training images nearest to them, in pixels",
    ("--nearest", "--n", "32"),
)
BETWEEN = ("From one random latent to another, in rows", ("--interpolate", "--n", "64"))
RECONSTRUCTED = (
    "Held-out images (upper rows) above their reconstructions",
    ("--reconstruct", "held-out", "--n", "32"),
)
COMPLETED = ("Held-out images, their upper halves, and completions of these", ("--show", "completions"))
CAPTIONED = ('From the caption "smiling cat face"', ("--caption", "smiling cat face", "--n", "32"))
ATTENDED = ("Where the attention of a generator's pixel goes", ("--show", "attention"))


def on(data: str, model: str, *train: str, name: str = "", **rest: Any) -> Entry:
    """An entry of a model on ``data/<data>``."""
    words = ("--data", f"data/{data}", *train)
    return Entry(model, words, name=f"{data.partition('/')[0]} {name or model}", **rest)


MNIST = (
    on("mnist", "vae", show=BOUNDS, views=(BETWEEN, RECONSTRUCTED)),
    on("mnist", "conv-vae", show=BOUNDS, views=(BETWEEN, RECONSTRUCTED)),
    on("mnist", "cvae", sample=("--n", "80"), show=(*BOUNDS, "class agreement"), views=(RECONSTRUCTED,)),
    on("mnist", "flow-vae", show=BOUNDS, views=(BETWEEN,)),
    on("mnist", "vq-vae", show=CODES, views=(RECONSTRUCTED,)),
    on("mnist", "gan", show=DISTANCES, views=(BETWEEN, COPIES)),
    on("mnist", "dcgan", show=DISTANCES, views=(BETWEEN, COPIES)),
    on("mnist", "cdcgan", sample=("--n", "80"), show=CLASSES, views=(COPIES,)),
    on("mnist", "sagan", sample=("--n", "80"), show=CLASSES, views=(COPIES, ATTENDED)),
    on("mnist", "image-transformer", show=CODES, views=(COMPLETED, COPIES)),
    on(
        *("mnist", "image-transformer", "--model.codebook-size", "0"),
        name="image-transformer, pixels",
        show=PIXELS,
        views=(COMPLETED,),
    ),
)
EMOJI = (
    on("emoji/google", "dcgan", show=DISTANCES, views=(BETWEEN, COPIES)),
    on("emoji/google", "sagan", sample=("--n", "72"), show=CLASSES, views=(COPIES, ATTENDED)),
    on("emoji/google", "stylegan", show=DISTANCES, views=(BETWEEN, COPIES)),
    on(
        *("emoji/google/people-body", "stylegan"),
        name="stylegan, one folder",
        show=DISTANCES,
        views=(BETWEEN, COPIES),
        note="A folder of 386 images without labels, of which 308 are trained on.",
    ),
    on("emoji/google", "transgan", show=DISTANCES, views=(COPIES,)),
    on("emoji/google", "vq-vae", show=CODES, views=(RECONSTRUCTED,)),
    on(
        *("emoji/google", "image-transformer", "--model.captions"),
        name="image-transformer, captions",
        show=(*PIXELS, "caption agreement"),
        views=(CAPTIONED, COMPLETED, COPIES),
    ),
    on(
        "emoji",
        "pix2pix",
        show=TRANSLATED,
        folder="translations",
        note="Groups of three rows of held-out emoji: input, translation, target.",
    ),
    on(
        "emoji",
        "cyclegan",
        show=("cycle error", "Frechet distance, a to b", "Frechet distance, a to b, not translated"),
        folder="a-b-a",
    ),
)
BUNDLED = (
    Entry("gan", show=DISTANCES),
    Entry("dcgan", show=DISTANCES),
    Entry("cgan", sample=("--n", "80"), show=CLASSES),
    Entry("cdcgan", sample=("--n", "80"), show=CLASSES),
    Entry("sagan", sample=("--n", "80"), show=CLASSES),
    Entry("attention-gan", show=DISTANCES),
    Entry("recurrent-gan", show=DISTANCES),
    Entry(
        "recurrent-gan",
        ("--data", "prose"),
        ("--n", "8"),
        name="recurrent-gan, text",
        note="It generates words and punctuation, no sentences. Known triples are those of other held-out pieces in the"
        " same batch, which is why real text is far from 1, too. GANs of text without pre-training stop there or need"
        " more than a GAN: for texts of 32 characters, Press et al. (2017) train on texts that become longer step by"
        " step, and let the generator continue real ones.",
    ),
    Entry("transgan", show=DISTANCES),
    Entry("stylegan", show=DISTANCES),
    Entry(
        "cyclegan",
        show=(
            "cycle error",
            *("Frechet distance, a to b", "Frechet distance, a to b, not translated"),
            *("Frechet distance, b to a", "Frechet distance, b to a, not translated"),
        ),
        folder="a-b-a",
        note="Groups of three rows of held-out patches: grass, its translation to gravel, and back to grass.",
    ),
    Entry(
        "pix2pix",
        show=TRANSLATED,
        folder="translations",
        note="Groups of three rows of held-out patches: input, translation, target.",
    ),
    Entry("vae", show=BOUNDS),
    Entry("conv-vae", show=BOUNDS),
    Entry("cvae", sample=("--n", "80"), show=(*BOUNDS, "class agreement")),
    Entry("flow-vae", show=BOUNDS),
    Entry("vq-vae", show=CODES),
    Entry(
        "transformer-lm",
        sample=("--n", "1"),
        show=("nats per token", "perplexity"),
        note="Tokens are characters. n-grams of the same text with interpolated modified Kneser-Ney smoothing reach"
        " 1.294 (5-gram) and 1.244 (7-gram) nats per character (`python benchmarks/ngram.py`).",
    ),
    Entry("seq2seq", sample=("--n", "12"), show=("exact",), name="seq2seq, reversal"),
    Entry("seq2seq", ("--data", "sums"), ("--n", "1", "--source", "128+345"), show=("exact",), name="seq2seq, sums"),
    Entry("image-transformer", show=PIXELS),
    Entry(
        "image-transformer",
        ("--model.conditional",),
        sample=("--n", "80"),
        show=("negative log-likelihood", "bits per dimension", *CLASSES),
        name="image-transformer, conditional",
    ),
    Entry(
        "image-transformer",
        ("--model.captions",),
        sample=("--n", "80"),
        show=("negative log-likelihood", "bits per dimension", *CLASSES, "caption agreement"),
        name="image-transformer, captions",
    ),
    Entry(
        "wavenet",
        sample=("--n", "4"),
        show=SOUNDS,
        note="Spectrogram of four sounds, one after the other. Linear predictions that are trained"
        " (`--model.trained-predictors true --model.predictors 64`) had 0.66 nats per token, and 0.89 of the energy at"
        " harmonics after 2,000 steps, 0.65 after 4,000.",
    ),
    Entry(
        "wavenet",
        ("--model.conditional",),
        sample=("--n", "4"),
        show=SOUNDS,
        name="wavenet, conditional",
        note="Spectrogram of four sounds of different classes, an instrument and a pitch, one after the other.",
    ),
)
GROUPS = (
    (
        "MNIST: digits of 28x28",
        "10,000 of MNIST's digits in `data/mnist` ([how to get them](data.md#mnist-and-emoji)), 8,000 of them to"
        " train on, the rest held out; pixels have 256 levels.",
        MNIST,
    ),
    (
        "Emoji: color images of 64x64",
        "1,906 emoji in two styles in `data/emoji` ([how to get them](data.md#mnist-and-emoji)), in nine classes,"
        " with captions; one in five is held out. They are Noto Emoji (Apache 2.0) and Twemoji (CC BY 4.0).",
        EMOJI,
    ),
    (
        "Bundled data: tests of a minute",
        "Digits of 8x8, patches of two photographs, text and tones, which need no files.",
        BUNDLED,
    ),
)
ENTRIES = tuple(entry for _, _, entries in GROUPS for entry in entries)


def fastgen(*words: str) -> tuple[str, float]:
    """(output, CPU seconds) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "fastgen", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"fastgen {' '.join(words)}: exit code {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()


def slug(key: str) -> str:
    return key.replace(", ", "-").replace(" ", "-")


def run(entry: Entry) -> dict:
    """Train, evaluate, sample; the record."""
    folder = RUNS / slug(entry.key)
    shown = folder.relative_to(ROOT)
    train = ["train", entry.model, *entry.train, "--out", str(shown)]
    _, seconds = fastgen(*train, "--overwrite")
    fastgen("evaluate", str(shown))
    record = {
        "model": entry.model,
        "command": f"fastgen {' '.join(train)}",
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "fastgen") else ""),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu_name()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "cpu_minutes": round(seconds / 60, 1),
        **json.loads((folder / "evaluation.json").read_text()),
    }
    environment = json.loads((folder / "environment.json").read_text())
    record |= {"parameters": environment["parameters"], "torch": environment["torch"]}
    return record | pictures(entry, folder)


def pictures(entry: Entry, folder: Path) -> dict:
    """Samples and further pictures in docs/models: what a record says about them."""
    shown, views = str(folder.relative_to(ROOT)), []
    for number, (caption, words) in enumerate(entry.views, 2):
        image = IMAGES / f"{slug(entry.key)}-{number}.png"
        fastgen("sample", shown, *words, "--out", str(image))
        views.append({"caption": caption, "sample": shlex.join(words), "picture": image.name})
    return samples(entry, folder) | ({"views": views} if views else {})


def samples(entry: Entry, folder: Path) -> dict:
    """Samples as an image in docs/models, or as an excerpt in the record."""
    shown = str(folder.relative_to(ROOT))
    IMAGES.mkdir(parents=True, exist_ok=True)
    image = IMAGES / f"{slug(entry.key)}.png"
    if entry.folder:
        shutil.copyfile(max((folder / entry.folder).glob("*.png")), image)
        return {"picture": image.name, "sample": "--n 64"}
    suffixes = {file.suffix for file in (folder / "samples").iterdir()}
    if ".txt" in suffixes:
        text, _ = fastgen("sample", shown, *entry.sample)
        return {"excerpt": text.strip()[:EXCERPT], "sample": " ".join(entry.sample)}
    if ".wav" in suffixes:
        sound = folder / "samples.wav"
        fastgen("sample", shown, *entry.sample, "--out", str(sound))
        spectrogram(sound, image)
    else:
        fastgen("sample", shown, *entry.sample, "--out", str(image))
    return {"picture": image.name, "sample": " ".join(entry.sample)}


def spectrogram(sound: Path, image: Path) -> None:
    import matplotlib
    import numpy as np

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with wave.open(str(sound)) as file:
        rate, width = file.getframerate(), file.getsampwidth()
        waves = np.frombuffer(file.readframes(file.getnframes()), {1: np.uint8, 2: np.int16}[width])
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    axes.specgram(waves / 2.0 ** (8 * width - 1), NFFT=256, noverlap=128, Fs=rate)
    axes.set(xlabel="seconds", ylabel="Hz")
    figure.savefig(image, dpi=90)
    plt.close(figure)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def formatted(metric: dict, floor: dict | None) -> str:
    """A metric without its interval, which is in the model's section."""
    beside = f" (real images {floor['value']:.2g})" if floor and metric["name"] == "Frechet distance" else ""
    return f"{metric['name']} {metric['value']:.3g}{beside} {metric['unit']}".rstrip()


def minutes(record: dict) -> str:
    return "not measured" if record["cpu_minutes"] is None else f"{record['cpu_minutes']:.1f}"


def page(records: dict[str, dict]) -> str:
    """docs/models.md."""
    lines = [HEAD]
    for title, about, entries in GROUPS:
        lines += [f"## {title}", "", about, "", *table(entries, records)]
        missing = [entry.key for entry in entries if entry.key not in records]
        if missing:
            lines += ["", f"Not measured yet: {', '.join(missing)}."]
        for entry in entries:
            if entry.key in records:
                lines += ["", f"### {slug(entry.key)}", "", *section(records[entry.key])]
                lines += ["", entry.note] if entry.note else []
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def table(entries: tuple[Entry, ...], records: dict[str, dict]) -> list[str]:
    rows = ["| model | parameters | CPU minutes | metrics on held-out items |", "|---|---|---|---|"]
    for entry in entries:
        if entry.key not in records:
            continue
        record = records[entry.key]
        found = {metric["name"]: metric for metric in record["figures"]}
        chosen = [found[name] for name in entry.show if name in found] or list(found.values())
        floor = found.get("Frechet distance, real against real")
        cell = "; ".join(formatted(metric, floor) for metric in chosen)
        rows.append(f"| [{entry.key}](#{slug(entry.key)}) | {record['parameters']:,} | {minutes(record)} | {cell} |")
    return rows if len(rows) > 2 else []


def section(record: dict) -> list[str]:
    from fastgen.metrics import Metric
    from fastgen.models import MODELS

    out = record["command"].rpartition(" ")[2]
    lines = [
        f"{MODELS[record['model']].summary}.",
        "",
        "```sh",
        record["command"],
        f"fastgen evaluate {out}",
        f"fastgen sample {out} {record['sample']}",
        *(f"fastgen sample {out} {view['sample']}" for view in record.get("views", [])),
        "```",
        "",
    ]
    if "picture" in record:
        lines += [f"![Samples](models/{record['picture']})", ""]
        for view in record.get("views", []):
            lines += [f"{view['caption']}:", "", f"![{view['caption']}](models/{view['picture']})", ""]
    else:
        lines += ["```text", *(line.rstrip() for line in record["excerpt"].splitlines()), "```", ""]
    lines += [f"- {Metric(**metric)}" for metric in record["figures"]]
    lines += [
        "",
        f"{record['step']:,} steps, {record['parameters']:,} parameters; minutes of CPU: {minutes(record)}"
        f" (OMP_NUM_THREADS={record['threads']}; {record['machine']}; torch {record['torch']};"
        f" commit {record['commit']}, {record['date']}).",
    ]
    return lines


HEAD = """# Results of the model zoo

Each model was trained once, with one seed, by the command shown with it; options that the command does not name have
their defaults. Bundled datasets need no download. `python benchmarks/zoo.py` writes this page, and the same numbers
into `benchmarks/results/zoo.json`. The models themselves are described in [The model zoo](zoo.md).

CPU minutes are those of the training process, all threads together, on a shared machine; on two idle cores a training
takes about half as long. Square brackets are 95 % intervals over held-out items or samples, not over trainings; some
defaults were chosen by these same metrics. Each Frechet distance is in the feature space named beside it, a small
network trained on the same data: distances in different spaces cannot be compared, and none with published FIDs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="entries; default: those that have no record yet")
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--pictures", action="store_true", help="make the pictures of runs that are there again")
    given = parser.parse_args()
    known = {entry.key: entry for entry in ENTRIES}
    unknown = sorted(set(given.names) - set(known))
    if unknown:
        parser.error(f"names: expected some of {'; '.join(known)}, got {'; '.join(unknown)}")
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    names = given.names or [name for name in known if (name in records) == given.pictures]
    for name in [] if given.render else names:
        folder = RUNS / slug(name)
        if given.pictures and not folder.is_dir():
            continue
        record = records[name] | pictures(known[name], folder) if given.pictures else run(known[name])
        records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        records[name] = record
        ordered = {key: records[key] for key in known if key in records}
        RECORDS.write_text(json.dumps(ordered, indent=1) + "\n")
        print(f"{name}: {record['cpu_minutes']} CPU minutes of training", flush=True)
    PAGE.write_text(page(records))


if __name__ == "__main__":
    main()
