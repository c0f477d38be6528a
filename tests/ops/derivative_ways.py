"""Ways to take first, second and third derivatives."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def weighted(tensors, weights):
    return sum((a * b).sum() for a, b in zip(tensors, weights, strict=True))


def everything(count):
    return tuple(range(count))


# --------------------------------------------------------------------------------------------------
# Ways to differentiate: f a scalar function of tensors x, d a direction. First or second order in d.


def double_backward(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(weighted(grads, d), leaves)


def checkpointed(f, x, d):
    return double_backward(lambda *t: checkpoint(f, *t, use_reentrant=False), x, d)


def grad_of_grad(f, x, d):
    grad = torch.func.grad(f, everything(len(x)))
    return torch.func.grad(lambda *t: weighted(grad(*t), d), everything(len(x)))(*x)


def forward(f, x, d):
    return (torch.func.jvp(f, tuple(x), tuple(d))[1],)


def dual_numbers(f, x, d):
    with forward_ad.dual_level():
        return (forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, d))).tangent,)


def forward_over_reverse(f, x, d):
    return torch.func.jvp(torch.func.grad(f, everything(len(x))), tuple(x), tuple(d))[1]


def dual_numbers_over_reverse(f, x, d):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), e) for t, e in zip(x, d, strict=True)]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(f(*duals), duals)]


def reverse_over_forward(f, x, d):
    return torch.func.grad(lambda *t: torch.func.jvp(f, t, tuple(d))[1], everything(len(x)))(*x)


def reverse_over_dual_numbers(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, leaves, d))).tangent
    return torch.autograd.grad(tangent, leaves)


def reverse_within_dual_numbers(f, x, d):
    """The gradient has a tangent too, a third derivative that is not requested."""
    leaves = [t.clone().requires_grad_() for t in x]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, leaves, d))).tangent
        return torch.autograd.grad(tangent, leaves)


def hessian(f, x, d):
    blocks = torch.func.hessian(f, everything(len(x)))(*x)
    return [sum(torch.tensordot(block, e, e.dim()) for block, e in zip(row, d, strict=True)) for row in blocks]


def jacobian_of_jacobian(f, x, d):
    blocks = torch.func.jacrev(torch.func.jacrev(f, everything(len(x))), everything(len(x)))(*x)
    return [sum(torch.tensordot(block, e, e.dim()) for block, e in zip(row, d, strict=True)) for row in blocks]


def vmapped(f, x, d):
    """Of one slice of two."""
    stacked = [torch.stack((t.flip(0), t)) for t in x]
    mapped = torch.func.vmap(lambda *t: grad_of_grad(f, t, d), randomness="same")(*stacked)
    return [t[1] for t in mapped]


def vmapped_forward(f, x, d):
    stacked = [torch.stack((t.flip(0), t)) for t in x]
    return (torch.func.vmap(lambda *t: torch.func.jvp(f, t, tuple(d))[1], randomness="same")(*stacked)[1],)


def compiled(backend, way):
    def run(f, x, d):
        torch._dynamo.reset()
        return way(torch.compile(f, backend=backend), x, d)

    return run


def compiled_around(backend, way):
    def run(f, x, d):
        torch._dynamo.reset()
        code = torch.compile(lambda *t: way(f.unseeded, t, d), backend=backend)  # a seed would break the graph
        torch.manual_seed(1)
        return code(*x)

    return run


def forward_over_forward(f, x, d):
    return (torch.func.jvp(lambda *t: torch.func.jvp(f, t, tuple(d))[1], tuple(x), tuple(d))[1],)


def third(f, x, d):
    leaves = [t.clone().requires_grad_() for t in x]
    grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    grads = torch.autograd.grad(weighted(grads, d), leaves, create_graph=True)
    return torch.autograd.grad(weighted(grads, d), leaves)


def directional_derivative(f, x, d):
    """<grad f, d>: what forward mode gives."""
    leaves = [t.clone().requires_grad_() for t in x]
    return (weighted(torch.autograd.grad(f(*leaves), leaves), d).detach(),)


def curvature(f, x, d):
    return (weighted(double_backward(f, x, d), d).detach(),)


FIRST = {
    "forward": forward,
    "dual numbers": dual_numbers,
    "vmap of forward": vmapped_forward,
    "forward of compiled": compiled("eager", forward),
    "compiled forward": compiled_around("aot_eager", forward),
}
SECOND = {
    "double backward": double_backward,
    "double backward with checkpoints": checkpointed,
    "torch.func.grad of grad": grad_of_grad,
    "forward over reverse": forward_over_reverse,
    "dual numbers over reverse": dual_numbers_over_reverse,
    "reverse over forward": reverse_over_forward,
    "reverse over dual numbers": reverse_over_dual_numbers,
    "reverse within dual numbers": reverse_within_dual_numbers,
    "hessian": hessian,
    "jacrev of jacrev": jacobian_of_jacobian,
    "vmap of grad of grad": vmapped,
    "compiled without AOTAutograd": compiled("eager", double_backward),
    "compiled with AOTAutograd": compiled("aot_eager", double_backward),
    "compiled grad of grad": compiled_around("eager", grad_of_grad),
    "compiled reverse over forward": compiled_around("aot_eager", reverse_over_forward),
}
WAYS = {
    **{name: (way, directional_derivative) for name, way in FIRST.items()},
    **{name: (way, double_backward) for name, way in SECOND.items()},
    "forward over forward": (forward_over_forward, curvature),
    "third": (third, third),
}
