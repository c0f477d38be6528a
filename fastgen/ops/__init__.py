"""Raw operators, one folder for each family: schema, fake, PyTorch implementation, vmap rule, derivatives."""

from __future__ import annotations

from fastgen.backend import choose_cpu_level, load_compiled, refuse_other_derivatives
from fastgen.ops import _contents, attention, flops, latent, projection
from fastgen.ops.attention import small

__all__ = ["attention", "latent", "projection"]

refuse_other_derivatives()
flops.register()
load_compiled()  # now that the operators, for which the libraries have kernels, have their schemas
choose_cpu_level()
_contents.use_compiled()
small.use_compiled()
