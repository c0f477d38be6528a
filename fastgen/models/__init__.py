"""The model zoo: each model is one file, its config first, its loss in it."""

from __future__ import annotations

from fastgen.models.attention_gan import AttentionGAN, AttentionGANConfig
from fastgen.models.base import (
    KINDS,
    TRANSLATED,
    Batch,
    GenerativeModel,
    Images,
    NoOptions,
    Phase,
    Samples,
    Sounds,
    StepContext,
    Texts,
    from_data,
    option,
    to_pixels,
)
from fastgen.models.cdcgan import CDCGAN, CDCGANConfig
from fastgen.models.cgan import CGAN, CGANConfig
from fastgen.models.conv_vae import ConvVAE, ConvVAEConfig
from fastgen.models.cvae import CVAE, CVAEConfig
from fastgen.models.cyclegan import CycleGAN, CycleGANConfig
from fastgen.models.dcgan import DCGAN, DCGANConfig
from fastgen.models.flow_vae import FlowVAE, FlowVAEConfig
from fastgen.models.gan import GAN, GANConfig
from fastgen.models.image_transformer import ImageTransformer, ImageTransformerConfig
from fastgen.models.pix2pix import Pix2Pix, Pix2PixConfig
from fastgen.models.recurrent_gan import RecurrentGAN, RecurrentGANConfig
from fastgen.models.registry import MODELS, create_model, find_model, list_models, load, register_model
from fastgen.models.sagan import SAGAN, SAGANConfig
from fastgen.models.seq2seq import Seq2Seq, Seq2SeqConfig
from fastgen.models.stylegan import StyleGAN, StyleGANConfig
from fastgen.models.transformer_lm import TransformerLM, TransformerLMConfig
from fastgen.models.transgan import TransGAN, TransGANConfig
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.vq_vae import VQVAE, VQVAEConfig
from fastgen.models.wavenet import WaveNet, WaveNetConfig
from fastgen.nn.averaging import recompute_buffers, recomputed_buffers

__all__ = [
    "CDCGAN",
    "CGAN",
    "CVAE",
    "DCGAN",
    "GAN",
    "KINDS",
    "MODELS",
    "SAGAN",
    "TRANSLATED",
    "VAE",
    "VQVAE",
    "AttentionGAN",
    "AttentionGANConfig",
    "Batch",
    "CDCGANConfig",
    "CGANConfig",
    "CVAEConfig",
    "ConvVAE",
    "ConvVAEConfig",
    "CycleGAN",
    "CycleGANConfig",
    "DCGANConfig",
    "FlowVAE",
    "FlowVAEConfig",
    "GANConfig",
    "GenerativeModel",
    "ImageTransformer",
    "ImageTransformerConfig",
    "Images",
    "NoOptions",
    "Phase",
    "Pix2Pix",
    "Pix2PixConfig",
    "RecurrentGAN",
    "RecurrentGANConfig",
    "SAGANConfig",
    "Samples",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Sounds",
    "StepContext",
    "StyleGAN",
    "StyleGANConfig",
    "Texts",
    "TransGAN",
    "TransGANConfig",
    "TransformerLM",
    "TransformerLMConfig",
    "VAEConfig",
    "VQVAEConfig",
    "WaveNet",
    "WaveNetConfig",
    "create_model",
    "find_model",
    "from_data",
    "list_models",
    "load",
    "option",
    "recompute_buffers",
    "recomputed_buffers",
    "register_model",
    "to_pixels",
]
