"""What was saved before the models were rewritten still loads, trains on, and computes the same (``saved/``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastgen.models import GenerativeModel
from tests.models.saved_models import CASES, SAVED, record


def close(ours: object, saved: object, where: str) -> None:
    if isinstance(saved, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(saved), where
        for name in saved:
            close(ours[name], saved[name], f"{where}, {name}")
    elif (
        isinstance(saved, (float, list)) and saved and not isinstance(saved[:1] if isinstance(saved, list) else 0, str)
    ):
        if isinstance(saved, list) and isinstance(saved[0], (str, int)):
            assert ours == saved, where
        else:
            a, b = (torch.tensor(values, dtype=torch.float64) for values in (ours, saved))
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == saved, where


@pytest.mark.parametrize("case", CASES)
def test_a_model_has_the_same_state_dict_losses_scores_and_samples(case: str) -> None:
    saved = json.loads((SAVED / f"{case.replace(', ', '-').replace(' ', '-')}.json").read_text())
    ours = json.loads(json.dumps(record(case)))
    assert dict(sorted(ours["state"].items())) == dict(sorted(saved["state"].items()))
    close({**ours, "state": None}, {**saved, "state": None}, case)


@pytest.mark.parametrize("name", ["dcgan", "pix2pix", "transformer-lm"])
def test_a_saved_run_loads_and_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from fastgen.cli import main
    from fastgen.train.loop import Trainer

    monkeypatch.setattr(Trainer, "write_pages", lambda self: None)
    saved = SAVED / "trained"
    shutil.copytree(saved / name, tmp_path / name)
    GenerativeModel.from_pretrained(tmp_path / name / "model")
    assert main(["train", name, "--resume", "--out", str(tmp_path / name), "--steps", "3"]) == 0
    state = GenerativeModel.from_pretrained(tmp_path / name / "model").state_dict()
    expected = json.loads((saved / "resumed.json").read_text())[name]
    assert sorted(state) == sorted(expected)
    for weight, (total, size) in expected.items():
        sums = torch.stack((state[weight].double().sum(), state[weight].double().abs().sum()))
        torch.testing.assert_close(sums, torch.tensor([total, size], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_renamed_options_are_accepted_in_saved_files_and_on_the_command_line(capsys: pytest.CaptureFixture) -> None:
    from fastgen.cli import main
    from fastgen.cli._errors import CommandError
    from fastgen.cli._train import _request
    from fastgen.train.checkpoint import load_checkpoint

    run = SAVED / "trained" / "pix2pix"
    saved = json.loads((run / "model" / "config.json").read_text())
    old, old_patch = "halvings", "patch_halvings"  # word-lint: ok
    config = GenerativeModel.from_pretrained(run / "model").config
    assert (config.num_downsamples, config.patch_num_downsamples) == (saved[old], saved[old_patch])
    header, _ = load_checkpoint(run / "checkpoint.safetensors")
    assert header.model_config["num_downsamples"] == saved[old]
    words = ["--config", str(run / "config.yaml"), "--model.patch-halvings", "2"]  # word-lint: ok
    options = _request("pix2pix", words).model_options
    assert (options["num_downsamples"], options["patch_num_downsamples"]) == (saved[old], 2)
    with pytest.raises(CommandError, match=r"num_downsamples: expected one value, got another under its old name"):
        _request("pix2pix", [f"--model.{old}", "2", "--model.num-downsamples", "3"])
    assert main(["train", "pix2pix", "--help"]) == 0
    assert old not in capsys.readouterr().out

    run, old = SAVED / "trained" / "transformer-lm", "normalise_heads"  # word-lint: ok
    assert old in json.loads((run / "model" / "config.json").read_text())
    assert GenerativeModel.from_pretrained(run / "model").config.qk_norm
    assert not _request("transformer-lm", [f"--model.{old}", "false"]).model_options["qk_norm"]
    config = GenerativeModel.from_pretrained(run / "model").config
    assert (config.num_heads, config.tie_embeddings) == (2, True)
    options = _request("transformer-lm", ["--model.heads", "3", "--model.tied", "false"]).model_options
    assert (options["num_heads"], options["tie_embeddings"]) == (3, False)


def test_renamed_sampling_options_are_accepted_on_the_command_line() -> None:
    from fastgen.cli._options import add_fields, given_under_current_names, options_parser, parse
    from fastgen.models.seq2seq import DecodingOptions

    def given(*words: str) -> dict[str, object]:
        parser = options_parser("sample", "")
        add_fields(parser, DecodingOptions)
        return given_under_current_names(DecodingOptions, parse(parser, list(words), defaults=True))

    assert DecodingOptions(beams=3).num_beams == 3  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="num_beams: expected one value"):
        DecodingOptions(beams=3, num_beams=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beam'"):
        DecodingOptions(beam=3)  # type: ignore[call-arg]
    assert given() == {"source": "", "num_beams": 1, "temperature": 0.0}
    assert given("--beams", "3", "--source", "ab") == {"source": "ab", "num_beams": 3, "temperature": 0.0}
    with pytest.raises(ValueError, match="num_beams: expected one value, got another under its old name beams"):
        given("--beams", "3", "--num-beams", "2")
