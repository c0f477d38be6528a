"""Tiny random Swin Transformers of torchvision, and their rows of the table in docs/integrations.md."""

from __future__ import annotations

import torch

from tests.integrations.contract import Case, rows_of

SIZES = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}


def swin():
    from torchvision.models import swin_transformer

    return swin_transformer.SwinTransformer(**SIZES, window_size=[4, 4])


def swin_v2():
    """One side of the second stage is a single window, and is not shifted."""
    from torchvision.models import swin_transformer

    parts = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    return swin_transformer.SwinTransformer(**SIZES, window_size=[4, 8], **parts)


def padded():
    """The feature maps, 16 x 14 and 8 x 7, are padded to multiples of the windows."""
    return {"x": torch.randn(2, 3, 32, 28)}


def images():
    """Without padding, where the second derivative of V2's normalization, of a zero vector, is NaN."""
    return {"x": torch.randn(2, 3, 32, 32)}


WORKS = {"r1_before": True, "jvp_before": True}

CASES = [
    Case("Swin", swin, padded, 4, note="windows", **WORKS),
    # The gradient of the temperature is a sum with cancellation, over queries instead of scores.
    Case("Swin V2", swin_v2, images, 4, note="learned temperature", float32_factor=6.0, **WORKS),
]


def rows():
    return rows_of("torchvision", CASES)
