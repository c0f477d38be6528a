"""save_pretrained and from_pretrained: the class that a folder loads as, errors, the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen.models import (
    CGAN,
    CVAE,
    GAN,
    MODELS,
    VAE,
    CVAEConfig,
    GANConfig,
    GenerativeModel,
    VAEConfig,
    pretrained,
)

pytest.importorskip("huggingface_hub")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    VAE(VAEConfig(image_size=4, width=4, depth=1)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_base_class_loads_the_class_in_the_config(saved: Path) -> None:
    for place in (saved, str(saved)):
        loaded = GenerativeModel.from_pretrained(place)
        assert type(loaded) is VAE
        assert not loaded.training
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.parameters(), VAE.from_pretrained(place).parameters(), strict=True)
        )


def test_a_run_loads_as_its_model_and_samples_without_an_options_object(saved: Path) -> None:
    for model in (fastgen.load(saved.parent), fastgen.load(str(saved)), VAE.from_pretrained(saved.parent)):
        assert type(model) is VAE
        assert not model.training
        images = model.sample(16)
        assert isinstance(images, torch.Tensor)
        assert images.shape == (16, 1, 4, 4)


def test_a_config_without_a_model_type_loads_by_its_options(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("model_type") == "vae"
    (saved / "config.json").write_text(json.dumps(config))
    assert type(GenerativeModel.from_pretrained(saved)) is VAE
    assert type(VAE.from_pretrained(saved)) is VAE
    del config["beta"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a model of fastgen"):
        GenerativeModel.from_pretrained(saved)


def test_class_names_are_saved_and_select_a_class(tmp_path: Path) -> None:
    model = CVAE(CVAEConfig(image_size=4, width=4, latent_dim=2, classes=2))
    with pytest.raises(ValueError, match=r"^label: expected a number, as the model has no class_names, got 'dog'$"):
        model.sample(1, label="dog")
    model.class_names = ("cat", "dog")
    model.save_pretrained(tmp_path)
    loaded = fastgen.load(tmp_path)
    assert loaded.class_names == ("cat", "dog")
    drawn = [loaded.sample(2, label=label, generator=torch.Generator().manual_seed(0)) for label in (1, "dog", "cat")]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match=r"^label: expected cat, dog, got 'cow'$"):
        loaded.sample(1, label="cow")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"class_names": [1]}))
    with pytest.raises(ValueError, match=r"config\.json: class_names: expected a list of names, got \[1\]$"):
        fastgen.load(tmp_path)


def test_a_model_of_another_class_raises_an_error_with_the_class_that_loads_it(tmp_path: Path) -> None:
    GAN(GANConfig(image_size=4, width=4, depth=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a saved CGAN, got one of model type 'gan'; load it by GAN\.from"):
        CGAN.from_pretrained(tmp_path)


def test_a_user_class_loads_its_own_models(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class MineConfig(VAEConfig):
        pass

    class Mine(VAE):
        name, config_class = "mine", MineConfig

    Mine(MineConfig(image_size=4, width=4, depth=1)).save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    with pytest.raises(ValueError, match=r"got model type 'mine'; a class of your own loads its models by its own"):
        GenerativeModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("broken", ["_config_digest", "seal_file", "json"])
def test_a_saved_model_is_kept_where_saving_over_it_fails(
    saved: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    class FullDisk:
        def __call__(self, *args: object, **options: object) -> None:
            raise OSError("No space left on device")

        dumps = __call__

    monkeypatch.setattr(pretrained, broken, FullDisk())
    with pytest.raises(OSError, match="No space left"):
        VAE(VAEConfig(image_size=4, width=8, depth=1)).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    monkeypatch.undo()
    VAE(VAEConfig(image_size=4, width=8, depth=1)).save_pretrained(saved)
    assert VAE.from_pretrained(saved).config.width == 8
    assert sorted(file.name for file in saved.iterdir()) == sorted(before)


def test_a_missing_folder_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_text("")
    for model in (VAE, GenerativeModel):
        for place, message in (
            (tmp_path / "nowhere", "got a path where there is no folder"),
            (f"{tmp_path}/nowhere", "got a path where there is no folder"),
            ("nowhere", "got a path where there is no folder"),
            ("./nowhere", "got a path where there is no folder"),
            ("runs/nowhere/model", "got a path where there is no folder"),
            (tmp_path / "file", "got a file"),
            (tmp_path / "run", "got a folder without config.json; it is a run that has not ended"),
        ):
            with pytest.raises(FileNotFoundError, match=f"{place}: expected a .*{message}"):
                model.from_pretrained(place)
        with pytest.raises(
            FileNotFoundError, match=r"runs/nowhere: expected a folder .* there is no such folder, and the Hub answered"
        ):
            model.from_pretrained("runs/nowhere", local_files_only=True)


def test_a_damaged_config_raises_an_error(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_ty')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON, got a file that is cut short or damaged"):
        VAE.from_pretrained(saved)
    (saved / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected options of a model, got list"):
        VAE.from_pretrained(saved)


def test_the_model_card_describes_the_model_and_its_code_runs(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "pushed" not in card
    assert "More Information Needed" not in card
    assert "The training of these weights was not recorded." in card
    assert "| width | 4 |" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(str(saved)))
    exec(code, {})


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_no_two_models_have_the_same_options(model: type[GenerativeModel]) -> None:
    fields = set(model.config_class.__dataclass_fields__)
    assert [other for other in MODELS.values() if set(other.config_class.__dataclass_fields__) == fields] == [model]
