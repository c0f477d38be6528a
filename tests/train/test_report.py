"""The report of a run: complete, self-contained, and safe for any contents of the run's files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.models import Images, Sounds, Texts
from fastgen.train import sample_history
from fastgen.train.report import write_report
from fastgen.train.sample_files import save_samples

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of styles and scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.found
            if name == tag and all(found.get(key.strip("_")) == value for key, value in attributes.items())
        ]


def write_metrics(folder: Path, steps: int, **values: float) -> None:
    rows = [
        {
            "step": step,
            "epoch": step / 10,
            "part": part,
            "values": values,
            "items_per_second": 80.0,
            "seconds": step * 2.0,
        }
        for step in range(1, steps + 1)
        for part in ("train", "held-out")
    ]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# fastgen train conv-vae --data digits\ndata: digits\nmodel: {width: 4}\n")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = Page(path).text
    assert "conv-vae on digits" in text
    assert "No step has finished yet" in text
    assert "Not evaluated yet: fastgen evaluate " in text
    assert "fastgen train conv-vae --data digits" in text
    assert Page(write_report(tmp_path)).text == text  # the page itself is nothing of the run


def test_an_empty_folder_has_a_page_and_a_missing_one_raises(tmp_path: Path) -> None:
    assert tmp_path.name in Page(write_report(tmp_path)).text
    with pytest.raises(FileNotFoundError, match="expected a run's folder"):
        write_report(tmp_path / "nothing")


def test_the_summary_and_the_table_list_metrics_and_settings(tmp_path: Path) -> None:
    write_metrics(tmp_path, 4, elbo=-12.345678)
    assert "held-out elbo −12.35 nats, at step 4" in Page(write_report(tmp_path)).text  # noqa: RUF001
    n = {"generated": 1000, "held-out": 359}
    metric = {"name": "Frechet distance", "value": 3.25, "low": 2.5, "high": 4.0, "space": "pixels", "n": n}
    floor = {"name": "the floor", "value": 0.25, "space": "pixels", "n": {"training": 1000, "held-out": 359}}
    same = {**floor, "name": "Frechet distance, real against real", "value": 0.125}
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 4, "figures": [floor, metric, same]}))
    (tmp_path / "environment.json").write_text(
        json.dumps({"parameters": 1234567, "devices": ["cpu", "cuda"], "torch": {"version": "2.13"}, "command": "go"})
    )
    text = Page(write_report(tmp_path)).text
    assert (
        "steps 4 epoch 0.4 training 8 s 80 items per second parameters 1,234,567"
        " Frechet distance 3.25 2.5 to 4, real images 0.125" in text
    )
    table = text[text.index("Evaluation at step 4") :]
    assert "Frechet distance 3.25 2.5 to 4 pixels 1,000 generated, 359 held-out" in table
    assert "A lower bound of the log-likelihood of an item. Higher is better." in text
    assert "devices cpu, cuda" in text
    assert "torch.version 2.13" in text
    assert "Not evaluated yet" not in text


def test_contents_of_a_run_are_escaped(tmp_path: Path) -> None:
    settings = {"model": HOSTILE, "data": HOSTILE, "options": {HOSTILE: HOSTILE}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (tmp_path / "environment.json").write_text(json.dumps({"command": HOSTILE, "started": HOSTILE, "torch": [HOSTILE]}))
    metric = dict.fromkeys(("name", "value", "low", "high", "unit", "space", "n", "note"), HOSTILE)
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": HOSTILE, "figures": [metric]}))
    write_metrics(tmp_path, 2, **{HOSTILE: 1.0})
    save_samples(tmp_path / HOSTILE.replace("/", ""), "000001", Texts([HOSTILE, HOSTILE]))
    page = Page(write_report(tmp_path))
    assert page.text.count(HOSTILE) >= 12
    assert len(page.all("script")) == 1
    assert not [found for _, found in page.found if "onerror" in found]


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "evaluation.json"])
@pytest.mark.parametrize(
    "content", [b"{{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 5_000], ids=["cut", "list", "bytes", "deep"]
)
def test_a_file_that_is_broken_is_named_on_the_page(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{name}: (can't be read|expected settings)", Page(write_report(tmp_path)).text)


def show_images(folder: Path, step: int) -> None:
    save_samples(folder, f"{step:06d}", Images(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))))


def show_texts(folder: Path, step: int) -> None:
    save_samples(folder, f"{step:06d}", Texts([f"first at {step}", f"second at {step}"]))


def show_sounds(folder: Path, step: int) -> None:
    save_samples(folder, f"{step:06d}", Sounds(torch.zeros(2, 100), 800))


@pytest.mark.parametrize(
    ("show", "tags"),
    [(show_images, {"img": 24}), (show_texts, {"img": 0}), (show_sounds, {"img": 24, "audio": 24})],
    ids=["images", "texts", "sounds"],
)
def test_samples_over_time_are_thinned_and_the_page_is_self_contained(
    tmp_path: Path, show: Callable[[Path, int], None], tags: dict[str, int]
) -> None:
    for step in range(1, 51):
        show(tmp_path / "samples", step * 100)
    path = write_report(tmp_path)
    page = Page(path)
    steps = [frame["data-step"] for frame in page.all("figure", class_="frame")]
    assert len(steps) == 24
    assert (steps[0], steps[-1]) == ("5,000", "100")
    assert "24 of 50 steps are on this page" in page.text
    assert {tag: len(page.all(tag)) for tag in tags} == tags
    assert ("second at 5000" in page.text) == (show is show_texts)
    addresses = [
        value or "" for _, found in page.found for key, value in found.items() if key in ("src", "href", "srcset")
    ]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in path.read_text(encoding="utf-8")
    assert "@import" not in path.read_text(encoding="utf-8")


def test_real_images_are_beside_the_samples_without_a_step(tmp_path: Path) -> None:
    for name, step in (("samples", 100), ("attention", 100), ("real", 0)):
        show_images(tmp_path / name, step)
    page = Page(write_report(tmp_path))
    names = [image["alt"] for image in page.all("img")]
    assert names == ["samples at step 100", "real", "attention at step 100"]
    assert "step 0" not in page.text


def test_large_images_and_sounds_do_not_make_a_large_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_history, "PAGE_BYTES", 300_000)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    for step in range(3):
        Image.fromarray(noise).save(tmp_path / "samples" / f"{step:06d}.png")
        save_samples(tmp_path / "sounds", f"{step:06d}", Sounds(torch.zeros(1, 30_000), 8000))
    (tmp_path / "samples" / "000003.png").write_bytes(b"no image")
    path = write_report(tmp_path)
    page = Page(path)
    assert path.stat().st_size < 450_000
    assert [str(found["src"]).startswith("data:image/jpeg") for found in page.all("img")] == [True] * 3 + [False]
    assert len(page.all("audio")) == 1


def test_links_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    show_texts(elsewhere, 1)
    (elsewhere / "secret").write_text("model: secret")
    (run / "samples").symlink_to(elsewhere)
    (run / "config.yaml").symlink_to(elsewhere / "secret")
    (run / "notes").mkdir()
    (run / "notes" / "000001.txt").symlink_to(elsewhere / "000001.txt")
    (run / "report.html").symlink_to(elsewhere / "secret")
    text = Page(write_report(run)).text
    assert "first at" not in text
    assert "secret" not in text
    assert (elsewhere / "secret").read_text() == "model: secret"
