"""Tiny random models of timm, and their rows of the table in docs/integrations.md. Does not import timm."""

from __future__ import annotations

import torch

from tests.integrations.contract import Case, rows_of

SIZES = {"img_size": 32, "num_classes": 5}
PLAIN = {**SIZES, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {**SIZES, "window_size": 4, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def case_of(name, model, options, replaced, kept=0, **more):
    def build():
        import timm

        return timm.create_model(model, **options)

    return Case(
        name,
        build,
        lambda: {"x": torch.randn(2, 3, 32, 32)},
        replaced,
        kept,
        **more,
    )


DERIVATIVES = {"r1_before": True, "jvp_before": True}
"""Of models that compute the softmax themselves."""

CASES = [
    case_of("ViT", "vit_tiny_patch16_224", PLAIN, 2),
    case_of("DeiT", "deit_tiny_distilled_patch16_224", PLAIN, 2),
    case_of("Swin", "swin_tiny_patch4_window7_224", WINDOWS, 4, note="windows", **DERIVATIVES),
    # The gradient of the temperature is a sum with cancellation, over queries instead of scores.
    case_of(
        "Swin V2",
        "swinv2_tiny_window8_256",
        WINDOWS,
        4,
        note="learned temperature",
        float32_factor=6.0,
        **DERIVATIVES,
    ),
    case_of(
        "CaiT",
        "cait_xxs24_224",
        {**PLAIN, "init_values": 0.1},
        2,
        kept=2,
        note="class attention; talking heads are left",
    ),
    case_of("EVA", "eva02_tiny_patch14_224", PLAIN, 2),
    # A bias that requires a gradient makes torch choose the formula, which has second derivatives.
    case_of("BEiT", "beit_base_patch16_224", {**PLAIN, "init_values": 0.1}, 2, r1_before=True, note="position bias"),
    case_of("XCiT", "xcit_nano_12_p16_224", {**PLAIN, "patch_size": 16}, 4, note="attention over channels"),
]


def rows():
    return rows_of("timm", CASES)
