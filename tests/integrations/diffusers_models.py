"""Tiny random models of diffusers, and their rows of the table in docs/integrations.md. Does not import diffusers."""

from __future__ import annotations

import torch

from tests.integrations.contract import Case, rows_of

TIME = torch.tensor([3.0, 5.0])


def unet2d():
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def unet2d_condition():
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )


def autoencoder():
    import diffusers

    return diffusers.AutoencoderKL(block_out_channels=(64,), sample_size=8, layers_per_block=1)


def autoencoder_attention():
    """The attention of the middle blocks of ``AutoencoderKL`` in its usual size, with one head."""
    from diffusers.models.attention_processor import Attention

    return Attention(
        512,
        heads=1,
        dim_head=512,
        bias=True,
        residual_connection=True,
        norm_num_groups=32,
        _from_deprecated_attn_block=True,
    )


def dit():
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def sd3():
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux():
    import diffusers

    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )


def flux_ids(ids):
    """Positions; diffusers 0.30 wants them for each item of the batch."""
    import diffusers

    return ids.expand(2, -1, -1) if diffusers.__version__.startswith("0.30.") else ids


def text(**more):
    return {"timestep": TIME, "encoder_hidden_states": torch.randn(2, 5, 12), **more}


CASES = [
    Case("UNet2D", unet2d, lambda: {"sample": torch.randn(2, 3, 8, 8), "timestep": TIME}, 4),
    Case("UNet2DCondition", unet2d_condition, lambda: {"sample": torch.randn(2, 4, 8, 8), **text()}, 8),
    Case("AutoencoderKL", autoencoder, lambda: {"sample": torch.randn(2, 3, 6, 6)}, 2),
    Case(
        "DiT",
        dit,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
        2,
    ),
    Case(
        "SD3",
        sd3,
        lambda: {"hidden_states": torch.randn(2, 4, 8, 8), **text(pooled_projections=torch.randn(2, 10))},
        2,
    ),
    Case(
        "Flux",
        flux,
        lambda: {
            "hidden_states": torch.randn(2, 6, 4),
            "img_ids": flux_ids(torch.arange(18.0).view(6, 3)),
            "txt_ids": flux_ids(torch.zeros(5, 3)),
            **text(pooled_projections=torch.randn(2, 10)),
        },
        2,
    ),
    Case(
        "Attention of AutoencoderKL",
        autoencoder_attention,
        lambda: {"hidden_states": torch.randn(2, 512, 3, 3)},
        1,
        note="head dim 512",
    ),
]


def rows():
    return rows_of("diffusers", CASES)
