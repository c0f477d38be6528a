"""Checks of an installed fastgen, run by the interpreter of the environment under test.

Prints one JSON object a line, {"check", "result", "detail"}; the last line is {"done": true}, which a process
that died does not print. Imports the standard library, torch and fastgen only. ``check_environments.py``
runs this file; so can a person:

    python tools/environment_checks.py [--libraries _cpu _cuda]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import fastgen
from fastgen import backend, functional, random, reference
from fastgen.testing import assert_accurate, largest_error

CPU_OPERATORS = [
    "cpu_attention_forward",
    "cpu_attention_backward",
    "cpu_attention_tangent",
    "cpu_attention_second_order",
    "cpu_attention_weights",
    "cpu_attention_softmax",
    "cpu_attention_softmax_backward",
    "cpu_dropout_keep",
    "cpu_finish_heads",
    "cpu_finish_heads_backward",
    "latent_forward",
    "latent_backward",
]
CUDA_OPERATORS = [
    "attention_forward",
    "attention_backward",
    "attention_tangent",
    "attention_forward_tangent",
    "attention_second_order",
    "latent_forward",
    "latent_backward",
    "projection_forward",
    "projection_backward",
    "merge_heads_forward",
    "merge_heads_backward",
]
B, H, N, M, D, E = 2, 4, 37, 53, 16, 24
DTYPES = (torch.float32, torch.bfloat16)


class NotChecked(Exception):
    """The environment cannot show what the check looks for; the text says why."""


# --------------------------------------------------------------------------------------------------
# The package and its libraries


def installed_package(libraries: list[str]) -> str:
    """The package comes from the environment, with the version of its metadata."""
    folder, site = Path(fastgen.__file__).resolve().parent, Path(sysconfig.get_paths()["purelib"]).resolve()
    assert folder.parent == site, f"fastgen was imported from {folder}, expected from {site}"
    version = importlib.metadata.version("fastgen")
    assert version == fastgen.__version__, f"__version__ is {fastgen.__version__}, the metadata has {version}"
    return f"fastgen {version}"


def loaded_libraries(libraries: list[str]) -> str:
    """Each library of the wheel is loaded, except _cuda under a torch without CUDA, which is refused with a reason."""
    states = {library.name: library for library in backend.compiled_libraries()}
    for name in libraries:
        if name == "_cuda" and torch.version.cuda is None:
            problem = states[name].problem
            told = problem is not None and "torch" in problem and "undefined symbol" not in problem
            assert told, f"_cuda under a torch without CUDA: expected a reason that names torch, got {problem!r}"
        else:
            assert states[name].loaded, f"{name} is not loaded: {states[name].problem}"
    return ", ".join(f"{name}: {states[name].problem or 'loaded'}" for name in libraries)


def _registered(operators: list[str], key: str) -> str:
    missing = [n for n in operators if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{n}", key)]
    assert not missing, f"no {key} kernel of {', '.join(missing)}"
    return f"{len(operators)} of {len(operators)}"


def cpu_operators(libraries: list[str]) -> str:
    if "_cpu" not in libraries:
        raise NotChecked("the wheel has no _cpu")
    return _registered(CPU_OPERATORS, "CPU")


def cuda_operators(libraries: list[str]) -> str:
    if "_cuda" not in libraries:
        raise NotChecked("the wheel has no _cuda")
    if torch.version.cuda is None:
        raise NotChecked("this torch has no CUDA")
    return _registered(CUDA_OPERATORS, "CUDA")


# --------------------------------------------------------------------------------------------------
# Attention


def _attention_cases() -> Iterator[tuple[str, Tensor | None, dict, tuple[int, int]]]:
    """Name, mask, options and window bounds."""
    yield "no mask", None, {}, (-1, -1)
    yield "causal", None, {"is_causal": True}, (-1, 0)
    yield "window", None, {"window": (9, 3)}, (9, 3)
    yield "bool mask", torch.rand(B, 1, N, M) > 0.4, {}, (-1, -1)
    yield "float mask", torch.randn(H, N, M), {}, (-1, -1)
    yield "float mask per key", torch.randn(B, 1, 1, M), {}, (-1, -1)
    # Before mid-2026, torch's own CPU kernel could read such masks as if they were contiguous (pytorch/pytorch#187506).
    yield "transposed float mask", torch.randn(B, H, M, N).mT, {}, (-1, -1)
    yield "transposed float mask of one batch", torch.randn(M, N).t(), {}, (-1, -1)
    yield "every other column of a float mask", torch.randn(B, 1, N, 2 * M)[..., ::2], {}, (-1, -1)
    yield "dropout", None, {"dropout_p": 0.3}, (-1, -1)
    yield "dropout, causal, float mask", torch.randn(N, M), {"dropout_p": 0.3, "is_causal": True}, (-1, 0)


def _keep(probability: float, seed: int) -> Tensor | None:
    """The dropout mask over its probability, that a call after ``torch.manual_seed(seed)`` draws."""
    if probability == 0:
        return None
    torch.manual_seed(seed)
    drawn = torch.empty(1, dtype=torch.int64).random_()
    rows, groups = B * H * N, random.groups_per_row(M)
    uniform = random.uniform_rows(drawn, torch.arange(rows), rows, groups, 0, groups)
    return ((uniform[:, :M] >= probability).double() / (1 - probability)).reshape(B, H, N, M)


def _attention_tensors(dtype: torch.dtype, key_heads: int = H) -> list[Tensor]:
    shapes = (B, H, N, D), (B, key_heads, M, D), (B, key_heads, M, E)
    return [torch.randn(shape).to(dtype) for shape in shapes]


Function = Callable[..., tuple[Tensor, ...]]


def _first_and_second(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, their gradients, and the gradients of the squared norm of these."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    loss = sum((out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    # A function that is linear in an argument has no second derivative there.
    second = torch.autograd.grad(
        sum(g.double().square().sum() for g in first), leaves, allow_unused=True, materialize_grads=True
    )
    return [t.detach() for t in (*outputs, *first, *second)]


def _tangents(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    directions = tuple(torch.linspace(1, -1, t.numel()).view_as(t).to(t.dtype) for t in tensors)
    return list(torch.func.jvp(function, tuple(tensors), directions)[1])


def _compare(name: str, ours: Function, formula: Function, tensors: list[Tensor]) -> None:
    """Values, first and second derivatives and tangents against ``formula`` in the same dtype and in float64."""
    wide = [t.double() for t in tensors]
    for what, results in (("values and gradients", _first_and_second), ("tangent", _tangents)):
        triples = zip(results(ours, tensors), results(formula, tensors), results(formula, wide), strict=True)
        for at, (actual, plain, exact) in enumerate(triples):
            # Sums of float32 in another order: a few roundings of the largest value beyond twice the formula's error.
            size = float(exact.abs().max())
            allowance = 32 * torch.finfo(actual.dtype).eps * size
            assert_accurate(actual, plain, exact, f"{name}: {what} {at}", allowance)


def attention(libraries: list[str]) -> str:
    """Masks, windows and dropout: output, logsumexp, gradients, double backward and tangent."""
    count = 0
    for dtype in DTYPES:
        for name, mask, options, (left, right) in _attention_cases():
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            keep = _keep(options.get("dropout_p", 0.0), 5)

            def ours(query, key, value, mask=mask, options=options):
                torch.manual_seed(5)
                return functional.scaled_dot_product_attention(query, key, value, mask, return_lse=True, **options)

            def formula(query, key, value, mask=mask, keep=keep, left=left, right=right):
                own = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
                weights = None if keep is None else keep.to(query.dtype)
                out, lse = reference.attention(query, key, value, own, weights, left, right)
                return out, lse if query.dtype == torch.float64 else lse.float()

            _compare(f"{name}, {dtype}", ours, formula, _attention_tensors(dtype))
            count += 1
    return f"{count} problems"


def float_masks_of_any_stride(libraries: list[str]) -> str:
    """A float mask gives what its contiguous copy gives, and its own gradient is right."""
    count = 0
    for dtype in (*DTYPES, torch.float16, torch.float64):
        query, key, value = _attention_tensors(dtype)
        for name, mask, options, _ in _attention_cases():
            if mask is None or mask.dtype == torch.bool or options:
                continue
            for own in {dtype, torch.float32 if dtype.itemsize < 4 else dtype}:
                ours, copied = mask.to(own), mask.to(own).contiguous()
                out = functional.scaled_dot_product_attention(query, key, value, ours)
                wanted, _ = reference.attention(query.double(), key.double(), value.double(), copied.double())
                error = largest_error(out, wanted)
                allowed = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
                assert error <= allowed, f"{name}, {dtype}, mask {own}: error {error:.1e}, allowed {allowed:.1e}"
                count += 1
    return f"{count} problems"


def narrow_heads(libraries: list[str]) -> str:
    """Heads for which fastgen has a CPU kernel of its own, and grouped heads."""
    narrow = [torch.randn(B, 1, n, d) for n, d in ((N, 8), (M, 8), (M, 32))]

    def attend(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, return_lse=True)

    def grouped(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, return_lse=True)

    _compare("narrow heads", attend, reference.attention, narrow)
    _compare("grouped heads", grouped, reference.attention, _attention_tensors(torch.float32, key_heads=2))
    return "2 problems"


# --------------------------------------------------------------------------------------------------
# Projection, latent, recurrent


def projection(libraries: list[str]) -> str:
    """Packed projections with norms and rotary embedding, in both layouts, and the merge with residual and gate."""
    channels, heads, dims = 20, (H, 2, 2), (D, D, E)
    angles = torch.rand(N, D // 2)
    count = 0
    for channels_first in (False, True):
        x = torch.randn(B, channels, N) if channels_first else torch.randn(B, N, channels)
        weight = torch.randn(sum(h * d for h, d in zip(heads, dims, strict=True)), channels) / 4
        norms = torch.rand(D) + 0.5, torch.rand(D) + 0.5
        bias = torch.randn(weight.size(0))

        def ours(x, weight, bias, first, second, channels_first=channels_first):
            return functional.qkv_projection(
                x,
                weight,
                bias,
                heads=heads,
                head_dims=dims,
                channels_first=channels_first,
                norms=(first, second),
                rotary=(angles.cos().to(x.dtype), angles.sin().to(x.dtype)),
            )

        def formula(x, weight, bias, first, second, channels_first=channels_first):
            tables = angles.cos().to(x.dtype)[None], angles.sin().to(x.dtype)[None]
            return tuple(
                reference.projection(
                    x, weight, bias, list(heads), list(dims), channels_first, (first, second), 1e-6, *tables, 2
                )
            )

        _compare(f"projection, channels_first={channels_first}", ours, formula, [x, weight, bias, *norms])

        def merge(x, weight, bias, residual, gate, channels_first=channels_first):
            given = {"residual": residual, "gate": gate, "channels_first": channels_first}
            return (functional.merge_heads_projection(x, weight, bias, **given),)

        def merge_formula(x, weight, bias, residual, gate, channels_first=channels_first):
            return (reference.merge_heads(x, weight, bias, residual, gate, channels_first),)

        residual = torch.randn(B, channels, N) if channels_first else torch.randn(B, N, channels)
        tensors = [torch.randn(B, H, N, D), torch.randn(channels, H * D) / 4, torch.randn(channels), residual]
        _compare(f"merge, channels_first={channels_first}", merge, merge_formula, [*tensors, torch.randn(channels)])
        count += 2
    return f"{count} problems"


def latent(libraries: list[str]) -> str:
    """Sample and KL divergence, with and without a prior, and their derivatives."""
    rows, cols = 5, 70
    torch.manual_seed(7)
    seed = torch.empty(1, dtype=torch.int64).random_()
    noise = random.standard_normal(seed, rows, cols)

    def ours(mu, logvar, *prior):
        torch.manual_seed(7)
        return functional.reparameterize_kl(mu, logvar, **dict(zip(("prior_mu", "prior_logvar"), prior, strict=False)))

    def formula(mu, logvar, *prior):
        z = mu + noise.to(mu.dtype) * torch.exp(0.5 * logvar)
        priors = prior or (None, None)
        return z, reference.kl_divergence(mu, logvar, *(p if p is None else p.expand(rows, cols) for p in priors))

    for count in (2, 4):
        _compare(f"latent of {count} tensors", ours, formula, [torch.randn(rows, cols) for _ in range(count)])
    return "2 problems"


def recurrent(libraries: list[str]) -> str:
    """LSTM and GRU against torch's layers with the same weights."""
    for name in ("LSTM", "GRU"):
        plain = getattr(torch.nn, name)(6, 7, num_layers=2, batch_first=True)
        layer = getattr(fastgen.nn, name)(6, 7, num_layers=2, batch_first=True)
        layer.load_state_dict(plain.state_dict())
        wide = getattr(torch.nn, name)(6, 7, num_layers=2, batch_first=True).double()
        wide.load_state_dict(plain.state_dict())

        def outputs(layer):
            return lambda data: (layer(data)[0],)

        x = torch.randn(3, 5, 6)
        results = [_first_and_second(outputs(which), [given]) for which, given in ((layer, x), (plain, x))]
        exact = _first_and_second(outputs(wide), [x.double()])
        for at, (a, b, c) in enumerate(zip(*results, exact, strict=True)):
            assert_accurate(a, b, c, f"{name} {at}", 32 * torch.finfo(torch.float32).eps * float(c.abs().max()))
    return "2 layers"


# --------------------------------------------------------------------------------------------------
# Dispatch: torch.compile, meta and fake tensors, forced backends


def compiled_graphs(libraries: list[str]) -> str:
    """torch.compile with fullgraph: the operators trace, and their gradients equal those of eager mode."""

    def step(query, key, value):
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.square().sum()

    tensors = _attention_tensors(torch.float32)
    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    return "aot_eager"


def meta_tensors(libraries: list[str]) -> str:
    query, key, value = (t.to("meta") for t in _attention_tensors(torch.float32))
    out = functional.scaled_dot_product_attention(query, key, value)
    assert out.shape == (B, H, N, E), out.shape
    assert functional.reparameterize(query, query).shape == query.shape
    return ""


def backends_agree(libraries: list[str]) -> str:
    """Backend ``torch`` and ``auto`` draw the same sample; ``compiled`` serves what the library has."""
    mu, logvar = torch.randn(4, 50), torch.randn(4, 50)
    samples = []
    names = ["auto", "torch", *(["compiled"] if "_cpu" in libraries else [])]
    for name in names:
        torch.manual_seed(3)
        with fastgen.use_backend(name):
            samples.append(functional.reparameterize(mu, logvar))
    for sample in samples[1:]:
        error = largest_error(sample, samples[0])
        assert error < 1e-5, f"backends differ by {error:.1e}"
    return ", ".join(names)


CHECKS: dict[str, Callable[[list[str]], str]] = {
    "package": installed_package,
    "libraries": loaded_libraries,
    "CPU operators": cpu_operators,
    "CUDA operators": cuda_operators,
    "attention": attention,
    "float masks of any stride": float_masks_of_any_stride,
    "narrow and grouped heads": narrow_heads,
    "projection": projection,
    "latent": latent,
    "recurrent": recurrent,
    "torch.compile": compiled_graphs,
    "meta tensors": meta_tensors,
    "backends": backends_agree,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="*", default=["_cpu"], help="libraries in the wheel")
    libraries = parser.parse_args().libraries
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            result, detail = "passed", check(libraries)
        except NotChecked as reason:
            result, detail = "not checked", str(reason)
        except Exception as error:
            result, detail = "failed", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(json.dumps({"check": name, "result": result, "detail": detail}), flush=True)
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
