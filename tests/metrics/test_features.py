"""Feature spaces."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import pytest
import torch
from torch import nn

from fastgen import metrics
from tests.metrics.samples import seeded


def test_classifier_features_of_digits(space, digits):
    images, labels = digits
    accuracy = float((space.predict(images[1400:]) == labels[1400:]).double().mean())
    assert accuracy > 0.93
    assert space.name == f"classifier-digits-64d ({accuracy:.1%} held-out accuracy)"
    found = space(images[:1400])
    assert found.shape == (1400, space.dims)
    torch.testing.assert_close(found.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(64), atol=1e-4, rtol=0)


def upright(n=60, size=9, channels=2):
    """Images that are dark at the top."""
    ramp = torch.linspace(0, 1, size)[:, None].expand(channels, size, size)
    return (0.8 * ramp + 0.2 * torch.rand(n, channels, size, size, generator=seeded())).contiguous()


def test_rotation_features_need_no_labels():
    found = metrics.rotation_features(upright(), data="ramps", dims=5, steps=40)
    assert found.name == "rotations-ramps-5d (100.0% held-out accuracy)"
    assert found(upright()).shape == (60, 5)
    with pytest.raises(ValueError, match="trained on labels"):
        found.predict(upright())


def test_feature_training_is_reproducible_and_preserves_the_rng_state():
    images, labels = upright(), torch.arange(60) % 3

    def trained(seed):
        return metrics.classifier_features(images, labels, seed=seed, steps=3, dims=4)(images)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode(), torch.autocast("cpu"):
        images = images.clone()
        torch.rand(1)
        assert torch.equal(trained(0), first)
    assert not torch.equal(trained(1), first)


@pytest.mark.parametrize("size", [1, 5, 28, 40])
def test_feature_networks_support_any_image_size(size):
    images = torch.rand(50, 3, size, size, generator=seeded())
    found = metrics.classifier_features(images, torch.arange(50) % 2, steps=2, dims=3)
    assert found(images).shape == (50, 3)


def test_feature_space_serialization_round_trip(space, digits):
    save, load = (pytest.importorskip("safetensors.torch").__dict__[name] for name in ("save", "load"))
    tensors, meta = space.state()
    before = torch.get_rng_state()
    again = metrics.FeatureSpace.from_state(load(save(tensors)), json.loads(json.dumps(meta)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.name, again.dims, again.accuracy) == (space.name, space.dims, space.accuracy)
    images = digits[0][:300]
    assert torch.equal(again(images), space(images))
    assert torch.equal(again.predict(images), space.predict(images))


def test_inception_features_require_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="inception_features needs torchvision"):
        metrics.inception_features()


class Inception(nn.Module):
    """Replacement of torchvision's network with the first pixel as features."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2048))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        return self.fc(x[:, :1, 0, 0] * self.scale)


def test_inception_features_require_intact_local_weights(monkeypatch, tmp_path):
    content = b"weights"
    file = tmp_path / "checkpoints" / f"inception-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    state = {**Inception().state_dict(), "scale": torch.full((2048,), 2.0)}

    def get_state_dict(progress, weights_only):
        assert weights_only
        return state

    weights = types.SimpleNamespace(url=f"https://example.org/{file.name}", get_state_dict=get_state_dict)
    models = types.ModuleType("torchvision.models")
    models.Inception_V3_Weights = types.SimpleNamespace(IMAGENET1K_V1=weights)
    models.inception_v3 = lambda **options: Inception()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    with pytest.raises(FileNotFoundError, match=r"inception-\w+\.pth: expected torchvision's weights"):
        metrics.inception_features()
    file.parent.mkdir()
    file.write_bytes(b"others")
    with pytest.raises(ValueError, match="expected the weights that torchvision names"):
        metrics.inception_features()
    file.write_bytes(content)
    space = metrics.inception_features()
    assert (space.name, space.dims) == ("inception-v3 (torchvision)", 2048)
    torch.testing.assert_close(space(torch.full((2, 1, 8, 8), 0.75)), torch.ones(2, 2048))
    assert metrics.FeatureSpace.from_state(*space.state()).name == space.name
