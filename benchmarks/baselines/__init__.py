"""Models of the zoo written with torch alone, as people write them: what ``bench_models.py`` compares with.

A twin has the state dict of its model and, for the same noise, the same loss (tests/models/test_twins.py).
It is one file, reads no fastgen, checks no arguments and keeps the options of the model's defaults only.
"""

from benchmarks.baselines.conv_vae import ConvVAETwin
from benchmarks.baselines.dcgan import DCGANTwin
from benchmarks.baselines.sagan import SAGANTwin
from benchmarks.baselines.stylegan import StyleGANTwin
from benchmarks.baselines.transformer_lm import TransformerLMTwin
from benchmarks.baselines.vae import VAETwin

TWINS = {
    "vae": VAETwin,
    "conv-vae": ConvVAETwin,
    "dcgan": DCGANTwin,
    "sagan": SAGANTwin,
    "stylegan": StyleGANTwin,
    "transformer-lm": TransformerLMTwin,
}
"""By the name of the model; built from its config."""

__all__ = ["TWINS", "ConvVAETwin", "DCGANTwin", "SAGANTwin", "StyleGANTwin", "TransformerLMTwin", "VAETwin"]
