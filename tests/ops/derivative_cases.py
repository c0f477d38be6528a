"""Every public function, module and penalty beside the same in plain PyTorch, for tests of derivatives."""

from __future__ import annotations

import math

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen import functional, losses, models, nn, random, reference
from fastgen.losses.adversarial import ADVERSARIAL_LOSSES
from fastgen.models.dcgan import DCGAN, DCGANConfig
from fastgen.models.transformer_lm import TransformerLM, TransformerLMConfig
from fastgen.ops.recurrent import autograd as implementation
from tests.nn import test_image

B, H, N, D = 2, 2, 3, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def plain_latent(mu, logvar, prior_mu=None, prior_logvar=None, generator=None):
    flat = mu.reshape(mu.size(0), -1)
    seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
    noise = random.standard_normal(seed, *flat.shape).to(mu.dtype).reshape(mu.shape)
    rows = [t if t is None else t.expand(mu.shape).reshape(flat.shape) for t in (prior_mu, prior_logvar)]
    return mu + noise * (0.5 * logvar).exp(), reference.kl_divergence(flat, logvar.reshape(flat.shape), *rows)


def plain_attention(query, key, value, attn_mask=None, window=(-1, -1), dropout_p=0.0, softcap=0.0):
    keep = None
    if dropout_p:
        seed, rows = torch.randint(0, 2**63 - 1, (1,)), query.shape[:-1].numel()
        groups = random.groups_per_row(key.size(-2))
        uniform = random.uniform_rows(seed, torch.arange(rows), rows, groups, 0, groups)[:, : key.size(-2)]
        keep = ((uniform >= dropout_p).double() / (1 - dropout_p)).reshape(*query.shape[:-1], key.size(-2))
    return reference.attention(query, key, value, attn_mask, keep, *window, softcap=softcap)


def gradient_norm_formula(scores, samples):
    (gradient,) = torch.autograd.grad(scores.sum(), samples, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def critic(x, weight):
    return (x @ weight).tanh().sum((1, 2)) + x.square().sum((1, 2))


def vae_loss(plain):
    torch.manual_seed(0)
    config = models.ConvVAEConfig(image_size=4, width=2, hidden_dim=4, latent_dim=2, levels=3)
    model = models.ConvVAE(config).double()

    def loss(images):
        kept = functional.reparameterize_kl
        functional.reparameterize_kl = plain_latent if plain else kept
        try:
            return model(images.sigmoid()).loss
        finally:
            functional.reparameterize_kl = kept

    return loss


def dcgan_loss(plain):
    """Of the discriminator, in the images, which its R1 penalty is differentiated by already.

    Without batch norm: PyTorch's tangents of its gradient, in training, are wrong.
    """
    torch.manual_seed(0)
    options = {"penalty": "r1", "penalty_weight": 2.0, "discriminator_norm": "layer"}
    model = DCGAN(DCGANConfig(image_size=8, width=2, latent_dim=2, **options)).double()
    model.generator.requires_grad_(False)

    def loss(images):
        if not plain:
            return model.loss("discriminator", {"images": images.sigmoid()}, models.StepContext(1, 1))["loss"]
        fake = model.generator(torch.randn(B, 2).double())
        real = 2 * images.sigmoid() - 1
        real = real if real.requires_grad else real.requires_grad_()
        real_scores, fake_scores = model.discriminator(real), model.discriminator(fake)
        entropy = (1 + (-real_scores).exp()).log().mean() + (1 + fake_scores.exp()).log().mean()
        return entropy + 2 * 0.5 * gradient_norm_formula(real_scores, real).mean()

    return loss


def language_case():
    """Of all weights, each of whose gradients passes through attention and projections; the tokens are fixed."""
    torch.manual_seed(0)
    model = TransformerLM(TransformerLMConfig(vocabulary="abc", context=N, width=2 * D, num_heads=2, depth=1)).double()
    tokens = torch.tensor([[0, 2, 1, 1], [1, 0, 0, 2]])
    formula = Formula(
        model, lambda layer, tokens: layer.loss("text", {"tokens": tokens}, models.StepContext(1, 1))["loss"]
    )
    names, values = zip(*formula.named_parameters(), strict=True)
    plain_functions = {
        "qkv_projection": lambda x, weight, bias, *, heads, head_dims, norms, rotary, **rest: reference.projection(
            x, weight, bias, list(heads), list(head_dims), False,
            norms, 1e-6, rotary[0][None], rotary[1][None], 2,
        ),
        "scaled_dot_product_attention": lambda *t, dropout_p, window: plain_attention(
            *t, window=[-1 if reach is None else reach for reach in window]
        )[0],
        "merge_heads_projection": lambda x, weight, bias, *, residual, **rest: reference.merge_heads(
            x, weight, bias, residual, None, False
        ),
    }  # fmt: skip

    def call(*weights):
        return functional_call(formula, dict(zip(names, weights, strict=True)), (tokens,))

    def oracle(*weights):
        kept = {name: getattr(functional, name) for name in plain_functions}
        try:
            for name, function in plain_functions.items():
                setattr(functional, name, function)
            return call(*weights)
        finally:
            for name, function in kept.items():
                setattr(functional, name, function)

    return call, oracle, [value.detach().clone() for value in values]


def plain_games(real, fake):
    """What the discriminator minimizes in each game."""
    entropy = (1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()
    squares = 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()
    margin = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    return entropy, entropy, squares, margin, fake.mean() - real.mean()


def plain_games_of_the_generator(fake):
    squares = 0.5 * (fake - 1).square().mean()
    return (1 - fake.sigmoid()).log().mean(), -fake.sigmoid().log().mean(), squares, -fake.mean(), -fake.mean()


def plain_recurrent(x, w_ih, w_hh, b_ih, b_hh, start=None):
    """A layer of LSTM (four gates) or GRU (three), one step after the other, from zeros or h = c = start."""
    lstm = w_ih.size(0) == 4 * w_hh.size(1)
    h = c = x.new_zeros(x.size(1), w_hh.size(1)) if start is None else start
    hidden = []
    for step in x:
        a, b = (step @ w_ih.T + b_ih).chunk(4 if lstm else 3, 1), (h @ w_hh.T + b_hh).chunk(4 if lstm else 3, 1)
        one, two = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
        if lstm:
            c = two * c + one * (a[2] + b[2]).tanh()
            h = (a[3] + b[3]).sigmoid() * c.tanh()
        else:
            h = (1 - two) * (a[2] + one * b[2]).tanh() + two * h
        hidden.append(h)
    return (torch.stack(hidden), h, c) if lstm else (torch.stack(hidden), h)


def recurrent_case(name, as_on_a_gpu=False):
    """``as_on_a_gpu``: differentiated as where torch gives the layer to a library."""
    layer = getattr(nn, name)(D, 2).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def ours(x, *weights):
        kept = implementation.accelerated
        implementation.accelerated = lambda device: as_on_a_gpu
        try:
            output, last = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        finally:
            implementation.accelerated = kept
        return (output, *last) if name == "LSTM" else (output, last)

    return ours, plain_recurrent, [normal(N, B, D), *(value.detach().clone() for value in values)]


def penalty(ours):
    """Of a fixed batch; differentiated with respect to the discriminator's weight."""
    torch.manual_seed(5)
    real, fake = normal(3, N, D), normal(3, N, D)

    def points(share):
        return share * real + (1 - share) * fake

    def one(name):
        def call(weight):
            torch.manual_seed(0)
            if name == "path_length_penalty":
                latents = real.clone().requires_grad_()
                images = (latents @ weight).tanh().unsqueeze(1)
                if ours:
                    return losses.path_length_penalty(images, latents, 0.5)[0]
                noise = torch.randn(images.shape, dtype=torch.float64) / (N * D) ** 0.5
                (gradient,) = torch.autograd.grad(images, latents, noise, create_graph=True)
                lengths = gradient.square().sum(-1).mean(-1).sqrt()
                mean = 0.5 + 0.01 * (lengths.detach().mean() - 0.5)
                return (lengths - mean).square().mean()
            if name in ("r1_penalty", "r2_penalty"):
                x = real.clone().requires_grad_()
                scores = critic(x, weight)
                return getattr(losses, name)(scores, x) if ours else 0.5 * gradient_norm_formula(scores, x).mean()
            if ours:
                arguments = (real, fake) if name == "gradient_penalty" else (real,)
                return getattr(losses, name)(lambda x: critic(x, weight), *arguments)
            share = torch.rand(3, 1, 1, dtype=torch.float64)
            if name == "gradient_penalty":
                x = points(share)
            else:
                x = real + (1 - share) * 0.5 * real.std(correction=0) * torch.rand(real.shape, dtype=torch.float64)
            x = x.requires_grad_()
            return (gradient_norm_formula(critic(x, weight), x).sqrt() - 1).square().mean()

        return call

    return one


def both(name, **kwargs):
    """A scalar of out and lse, ours and the formula's."""
    ours = lambda *t: functional.scaled_dot_product_attention(*t, return_lse=True, **kwargs)  # noqa: E731
    translated = {"window": kwargs["window"]} if "window" in kwargs else {}
    translated |= {"window": (-1, 0)} if kwargs.get("is_causal") else {}
    translated |= {name: kwargs[name] for name in ("dropout_p", "softcap") if name in kwargs}
    formula = lambda *t: plain_attention(*t, **translated)  # noqa: E731
    return ours, formula


def attention_case(mask=None, **kwargs):
    tensors = [normal(B, H, N, D), normal(B, H, N, D), normal(B, H, N, 2)] + ([] if mask is None else [normal(*mask)])
    return (*both("attention", **kwargs), tensors)


def attention_jvp_case():
    """Of output and tangent, in the primals and one direction."""
    of_key, of_value = normal(B, H, N, D), normal(B, H, N, 2)

    def ours(*t):
        return functional.scaled_dot_product_attention_jvp(t[:3], (t[3], of_key, of_value))

    def formula(*t):
        tangents = t[3], of_key, of_value, None
        of_out, _ = reference.attention_tangent(*t[:3], None, *tangents, None, -1, -1, D**-0.5)
        return plain_attention(*t[:3])[0], of_out

    return ours, formula, [normal(B, H, N, D), normal(B, H, N, D), normal(B, H, N, 2), normal(B, H, N, D)]


def packed_case():
    """Three sequences, one of them empty."""
    begins = [0, 2, 2, 5]

    def ours(*t):
        return functional.varlen_attention(*t, torch.tensor(begins), is_causal=True, return_lse=True)

    def formula(query, key, value):
        return reference.packed_attention(query, key, value, begins, begins, window_right=0)

    return ours, formula, [normal(5, H, D), normal(5, H, D), normal(5, H, 3)]


class Formula(torch.nn.Module):
    """``plain(layer, *inputs)``, with the layer's parameters."""

    def __init__(self, layer, plain):
        super().__init__()
        self.layer, self.plain = layer, plain

    def forward(self, *inputs):
        return self.plain(self.layer, *inputs)


def feature_map_case(case):
    """Differentiated in the input and in the parameters."""
    layer, x = test_image.made(case, test_image.TINY)
    formula = Formula(layer, test_image.plain)
    names = [name for name, _ in layer.named_parameters()]

    def call(module, prefix):
        return lambda x, *p: functional_call(module, {prefix + n: t for n, t in zip(names, p, strict=True)}, x)

    return call(layer, ""), call(formula, "layer."), [x, *(p.detach() for p in layer.parameters())]


def rotated(x):
    """By complex numbers."""
    angles = torch.outer(torch.arange(3, 3 + N, dtype=torch.float64), 10000.0 ** -torch.arange(0, 1, 2 / D).double())
    a, b = x.chunk(2, dim=-1)
    rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def rotary_case(layer):
    tensors = [normal(B, H, N, D), normal(B, 1, N, D)]
    return lambda q, k: layer(q, k, offset=3), lambda q, k: (rotated(q), rotated(k)), tensors


def bias_case(layer):
    """Four buckets for keys up to the query and four for those after it; of each, distances 0, 1 and beyond."""
    bucket = torch.tensor([[min(abs(j - i), 2) + 4 * (j > i) for j in range(4)] for i in range(3)])
    ours = lambda w: functional_call(layer, {"weight": w}, (3, 4))  # noqa: E731
    return ours, lambda w: w[bucket].permute(2, 0, 1), [normal(8, 2)]


def through_cache(query, key, value):
    cache = nn.KVCache(B, H, N + 1, D, dtype=torch.float64)
    return functional.scaled_dot_product_attention(query, *cache.update(key, value))


def transformer_case(name):
    """Of the inputs, and the first attention's packed weight; the oracle is torch's layer with its plain attention."""
    kwargs = {"dropout": 0.0, "batch_first": True}
    wide = kwargs | {"dim_feedforward": 4, "activation": torch.tanh}

    def build(module):
        if name == "MultiheadAttention":
            return module.MultiheadAttention(D, H, **kwargs)
        if name == "Transformer":
            return module.Transformer(D, H, 1, 1, **wide)
        layer = getattr(module, name.removesuffix("Layer") + "Layer")(D, H, **wide)
        return layer if name.endswith("Layer") else getattr(module, name)(layer, 1)

    mine, theirs = (build(module).double().requires_grad_(False) for module in (nn, torch.nn))
    theirs.load_state_dict(mine.state_dict())
    weight, value = next((n, p.detach()) for n, p in mine.named_parameters() if n.endswith("in_proj_weight"))
    inputs = {"MultiheadAttention": 3, "TransformerEncoderLayer": 1, "TransformerEncoder": 1}.get(name, 2)
    options = {"need_weights": False} if name == "MultiheadAttention" else {}

    def run(module, first, *tensors):
        result = functional_call(module, {weight: first}, tensors, options)
        return result[0] if options else result

    def plain(*tensors):
        with sdpa_kernel(SDPBackend.MATH):
            return run(theirs, *tensors)

    return lambda *tensors: run(mine, *tensors), plain, [value, *(normal(B, N, D) for _ in range(inputs))]


TABLES = (torch.arange(N).double()[:, None].cos(), torch.arange(N).double()[:, None].sin())


PENALTIES = [name for name in losses.__all__ if name.endswith("_penalty")]
QKV = {"heads": (2, 1, 1), "head_dims": (2, 2, 3)}
CASES = {
    # name: ours, the same in plain PyTorch, arguments. Results are reduced to a number by `scalar`.
    "scaled_dot_product_attention": lambda: attention_case(),
    "scaled_dot_product_attention, causal": lambda: attention_case(is_causal=True),
    "scaled_dot_product_attention, window": lambda: attention_case(window=(1, 1)),
    "scaled_dot_product_attention, bias": lambda: attention_case(mask=(H, 1, N)),
    "scaled_dot_product_attention_jvp": attention_jvp_case,
    "varlen_attention": packed_case,
    "scaled_dot_product_attention, softcap": lambda: attention_case(mask=(H, 1, N), softcap=0.7),
    "scaled_dot_product_attention, dropout": lambda: attention_case(dropout_p=0.4),
    "multi_head_projection": lambda: (
        lambda x, w, b: functional.multi_head_projection(x, w, b, num_heads=2),
        lambda x, w, b: reference.projection(x, w, b, [2], [3], False)[0],
        [normal(B, N, D), normal(6, D), normal(6)],
    ),
    "qkv_projection": lambda: (
        lambda x, w, b: functional.qkv_projection(x, w, b, **QKV),
        lambda x, w, b: tuple(reference.projection(x, w, b, list(QKV["heads"]), list(QKV["head_dims"]), False)),
        [normal(B, N, D), normal(9, D), normal(9)],
    ),
    "qkv_projection, norms and rotary": lambda: (
        lambda x, w, n, m: functional.qkv_projection(x, w, **QKV, norms=(n, m), rotary=TABLES),
        lambda x, w, n, m: tuple(
            reference.projection(
                x,
                w,
                None,
                *(list(QKV[name]) for name in ("heads", "head_dims")),
                False,
                (n, m), 1e-6, TABLES[0][None], TABLES[1][None], 2,
            )
        ),
        [normal(B, N, D), normal(9, D), normal(2), normal(2)],
    ),
    "qkv_projection, norms and rotary, of a feature map": lambda: (
        lambda x, w, n: functional.qkv_projection(x, w, **QKV, norms=(n,), rotary=TABLES, channels_first=True),
        lambda x, w, n: tuple(
            reference.projection(
                x,
                w,
                None,
                *(list(QKV[name]) for name in ("heads", "head_dims")),
                True,
                (n,), 1e-6, TABLES[0][None], TABLES[1][None], 2,
            )
        ),
        [normal(B, D, N), normal(9, D), normal(2)],
    ),
    "rotary_embedding": lambda: (
        functional.rotary_embedding,
        lambda x, cos, sin: reference.rotary(x, cos[None], sin[None], False),
        [normal(B, H, N, D), *TABLES],
    ),
    "merge_heads_projection": lambda: (
        lambda x, w, b, r, g: functional.merge_heads_projection(x, w, b, residual=r, gate=g),
        lambda x, w, b, r, g: reference.merge_heads(x, w, b, r, g, False),
        [normal(B, H, N, D), normal(5, H * D), normal(5), normal(B, N, 5), normal(5)],
    ),
    "reparameterize": lambda: (
        functional.reparameterize,
        lambda m, v: plain_latent(m, v)[0],
        [normal(B, D), normal(B, D)],
    ),
    "reparameterize_kl": lambda: (
        lambda m, v, pm, pv: functional.reparameterize_kl(m, v, prior_mu=pm, prior_logvar=pv),
        plain_latent,
        [normal(B, D), normal(B, D), normal(B, D), normal(B, D)],
    ),
    "GaussianLatent": lambda: (
        nn.GaussianLatent(),
        lambda h: plain_latent(*h.chunk(2, dim=1)),
        [normal(B, 2 * D, 2)],
    ),
    "LSTM, as on a GPU": lambda: recurrent_case("LSTM", as_on_a_gpu=True),
    "GRU": lambda: recurrent_case("GRU"),
    "SelfAttention2d": lambda: feature_map_case("self"),
    "AttentionBlock2d": lambda: feature_map_case("block"),
    "AttentionGate2d": lambda: feature_map_case("gate"),
    "WindowAttention2d": lambda: feature_map_case("window"),
    "PositionalEncoding": lambda: (
        nn.PositionalEncoding(3, 4).double(),
        lambda x: x + torch.stack([torch.tensor([math.sin(p), math.cos(p), math.sin(p / 1e4 ** (2 / 3))]).double()
                                   for p in range(N)]),
        [normal(B, N, 3)],
    ),
    "RotaryEmbedding": lambda: rotary_case(nn.RotaryEmbedding(D)),
    "RelativePositionBias": lambda: bias_case(nn.RelativePositionBias(2, num_buckets=8, max_distance=16)),
    "KVCache": lambda: (
        through_cache,
        lambda *t: plain_attention(*t, window=(-1, 0))[0],
        [normal(B, H, N, D), normal(B, H, N, D), normal(B, H, N, D)],
    ),
    **{n: (lambda n=n: transformer_case(n)) for n in nn.__all__ if n == "MultiheadAttention" or "Transformer" in n},
    "ConvVAE": lambda: (vae_loss(plain=False), vae_loss(plain=True), [normal(B, 1, 4, 4)]),
    "DCGAN": lambda: (dcgan_loss(plain=False), dcgan_loss(plain=True), [normal(B, 1, 8, 8)]),
    "TransformerLM": language_case,
    "discriminator_loss": lambda: (
        lambda r, f: tuple(losses.discriminator_loss(r, f, kind) for kind in ADVERSARIAL_LOSSES),
        plain_games,
        [normal(B, 1), normal(3)],
    ),
    "generator_loss": lambda: (
        lambda f: tuple(losses.generator_loss(f, kind) for kind in ADVERSARIAL_LOSSES),
        plain_games_of_the_generator,
        [normal(B, N)],
    ),
    **{n: (lambda n=n: (penalty(True)(n), penalty(False)(n), [normal(D, D)])) for n in PENALTIES},
}  # fmt: skip


def scalar(function):
    """A number that is not linear in any of the results, with the same random numbers in each call."""

    def unseeded(*tensors):
        results = function(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        return sum((result.sin() * torch.linspace(0.5, 1.5, result.numel()).to(result).reshape(result.shape)).sum()
                   for result in results)  # fmt: skip

    def total(*tensors):
        torch.manual_seed(1)
        return unseeded(*tensors)

    total.unseeded = unseeded
    return total
