"""LSTM and GRU against torch: values, derivatives, packed sequences, and the cuDNN path simulated on CPU."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from fastgen import losses, nn
from fastgen.ops.recurrent import autograd as implementation
from fastgen.testing import assert_accurate
from tests.conftest import DEVICES
from tests.nn.recurrent_cases import (
    BOTH,
    CALLS,
    GRID,
    OPTIONS,
    B,
    C,
    H,
    T,
    assert_all_close,
    derivatives,
    flat,
    normal,
    pair,
    scalar,
    simulate_cudnn,
    states_of,
)


@pytest.fixture
def cudnn(monkeypatch):
    """Runs CPU tensors through the GPU path, with an implementation that is once differentiable."""
    simulate_cudnn(monkeypatch)
    return CALLS


@pytest.fixture(params=["simulated cuDNN", *DEVICES])
def device(request, monkeypatch):
    if request.param == "simulated cuDNN":
        simulate_cudnn(monkeypatch)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


# --------------------------------------------------------------------------------------------------
# Equivalence to torch


@pytest.mark.parametrize(("name", "options", "given"), GRID, ids=str)
def test_values_and_first_and_second_derivatives_match_torch(device, name, options, given):
    theirs, ours = pair(name, device, **options)
    x = normal(*((B, T) if options["batch_first"] else (T, B)), C, device=device)
    hx = states_of(ours, B, device) if given else None
    with torch.backends.cudnn.flags(enabled=False):
        expected = derivatives(theirs, x, hx)
    assert_all_close(derivatives(ours, x, hx), expected)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[12], OPTIONS[13]], ids=str)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", ["sorted", "unsorted", "padded", "unbatched"])
def test_packed_padded_and_unbatched_sequences(device, kind, name, options, given):
    theirs, ours = pair(name, device, **options)
    leaf = normal(T + 1, B, C, device=device)

    def sequence(x):
        if kind == "unbatched":
            return x[:, 0]
        if kind == "padded":
            return pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
        lengths = [5, 2, 2] if kind == "sorted" else [2, 5, 3]
        return pack_sequence([x[:n, i] for i, n in enumerate(lengths)], enforce_sorted=kind == "sorted")

    hx = states_of(ours, B, device) if given else None
    if given and kind == "unbatched":
        hx = tuple(t[:, 0] for t in hx) if name == "LSTM" else hx[:, 0]

    class Around(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.mode = layer, layer.mode

        def forward(self, x, hx):
            return self.layer(sequence(x), hx)

    with torch.backends.cudnn.flags(enabled=False):
        expected = derivatives(Around(theirs), leaf, hx)
    assert_all_close(derivatives(Around(ours), leaf, hx), expected)
    for result, wanted in zip(ours(sequence(leaf), hx)[0], theirs(sequence(leaf), hx)[0], strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("name", BOTH)
def test_cpu_results_are_bitwise_equal_to_torch_including_dropout(name):
    theirs, ours = pair(name, dtype=torch.float32, num_layers=3, dropout=0.5)
    x = torch.randn(T, B, C)
    for train in (True, False):
        torch.manual_seed(1)
        expected = flat(theirs.train(train)(x))
        torch.manual_seed(1)
        for a, b in zip(flat(ours.train(train)(x)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", BOTH)
def test_empty_batch(device, name):
    theirs, ours = pair(name, device)
    assert_all_close(flat(ours(normal(T, 0, C, device=device))), flat(theirs(normal(T, 0, C, device=device))))


# --------------------------------------------------------------------------------------------------
# Derivatives


class Critic(torch.nn.Module):
    """A recurrent discriminator of (B, T, C)."""

    def __init__(self, recurrent, heads):
        super().__init__()
        self.recurrent, self.head = recurrent, torch.nn.Linear(heads, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.recurrent(x)[0].mean(1))


@pytest.mark.parametrize("name", BOTH)
def test_gradient_penalty_of_a_recurrent_discriminator(device, name):
    theirs, ours = pair(name, device, num_layers=2, batch_first=True, bidirectional=True)
    real, fake = normal(2, B, T, C, device=device)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(4)
        critic = Critic(layer, 2 * H).to(device)
        torch.manual_seed(5)
        with torch.backends.cudnn.flags(enabled=layer is ours):
            loss = critic(fake).mean() - critic(real).mean() + 10 * losses.gradient_penalty(critic, real, fake)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in critic.parameters())])
    assert_all_close(*results)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_gradcheck(device, name, bidirectional):
    layer = getattr(nn, name)(2, 2, bidirectional=bidirectional).to(device, torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = [t.detach().requires_grad_() for t in (normal(2, 2, 2, device=device), *values)]

    def call(x, *weights):
        return tuple(flat(functional_call(layer, dict(zip(names, weights, strict=True)), (x,))))

    assert gradcheck(call, inputs, check_forward_ad=device.type == "cpu", fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_forward_mode_and_transforms(device, name, dtype):
    """In torch, float32 LSTM has no forward mode on CPU, and no recurrent layer supports vmap."""
    theirs, ours = pair(name, device, dtype, num_layers=2, bidirectional=True)
    theirs = theirs.double()
    x, d = normal(2, T, B, C, device=device)
    f = lambda layer: lambda x: scalar(flat(layer(x)))  # noqa: E731
    with torch.backends.cudnn.flags(enabled=False):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(theirs)(leaf), leaf, create_graph=True)
        (hvp,) = torch.autograd.grad((gradient * d).sum(), leaf)
    x, d, ours_f = x.to(dtype), d.to(dtype), f(ours)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours_f(forward_ad.make_dual(x, d))).tangent
    results = {
        "jvp": (torch.func.jvp(ours_f, (x,), (d,))[1], (gradient * d).sum()),
        "dual": (dual, (gradient * d).sum()),
        "grad": (torch.func.grad(ours_f)(x), gradient),
        "vmap": (torch.func.vmap(torch.func.grad(ours_f))(torch.stack([d, x]))[1], gradient),
        "jvp of grad": (torch.func.jvp(torch.func.grad(ours_f), (x,), (d,))[1], hvp),
        "grad of jvp": (torch.func.grad(lambda x: torch.func.jvp(ours_f, (x,), (d,))[1])(x), hvp),
    }
    for name, (result, expected) in results.items():
        torch.testing.assert_close(result, expected.detach().to(dtype), msg=name)


@pytest.mark.parametrize("name", BOTH)
def test_functional_call_weights_are_differentiated(device, name):
    _, ours = pair(name, device, num_layers=2)
    x, values = normal(T, B, C, device=device), dict(ours.named_parameters())
    expected = torch.autograd.grad(scalar(flat(ours(x))), values.values())
    results = torch.func.grad(lambda values: scalar(flat(functional_call(ours, values, (x,)))))(values)
    assert_all_close(results.values(), expected)
    single = copy.deepcopy(ours).float()
    assert_all_close(flat(functional_call(single, values, (x,))), flat(ours(x)))
    assert_all_close(flat(single(x.float())), flat(copy.deepcopy(single)(x.float())))


@pytest.mark.parametrize("name", BOTH)
def test_input_computed_from_a_weight_is_differentiated_once(device, name):
    """The recorded gradient ends at the layer; autograd adds the path to its inputs."""
    theirs, ours = pair(name, device, num_layers=1)
    x = normal(T, B, C, device=device)

    def second_order(layer):
        weight = layer.weight_ih_l0
        y = scalar(flat(layer((x @ weight.T @ weight).sin())))
        (first,) = torch.autograd.grad(y, weight, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), layer.parameters())]

    with torch.backends.cudnn.flags(enabled=False):
        expected = second_order(theirs)
    assert_all_close(second_order(ours), expected)


@pytest.mark.parametrize("name", BOTH)
def test_third_derivative(device, name):
    theirs, ours = pair(name, device)
    x = normal(2, 2, C, device=device).requires_grad_()

    def third(layer):
        y = scalar(flat(layer(x)))
        for _ in range(2):
            y = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(y, [x, *layer.parameters()])

    with torch.backends.cudnn.flags(enabled=False):
        expected = third(theirs)
    assert_all_close(third(ours), expected)


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_a_single_result(device, which):
    theirs, ours = pair("LSTM", device, num_layers=2, proj_size=2)
    x = normal(T, B, C, device=device).requires_grad_()
    for create in (False, True):
        results = [
            torch.autograd.grad(
                flat(layer(x))[which].square().sum(),
                [x, *layer.parameters()],
                create_graph=create,
                materialize_grads=True,
            )
            for layer in (ours, theirs)
        ]
        assert_all_close(*results)


def test_dropout_mask_is_shared_by_all_derivatives(device):
    """Finite differences of the gradient with the random numbers of one seed."""
    layer = nn.LSTM(2, 2, num_layers=3, dropout=0.5).to(device, torch.float64)
    x = normal(2, 2, 2, device=device).requires_grad_()

    def call(x):
        torch.manual_seed(7)
        return tuple(flat(layer(x)))

    assert gradcheck(call, [x])
    assert gradgradcheck(call, [x])
    expected = torch.func.jvp(call, (x.detach(),), (torch.ones_like(x),))[1]
    if device.type == "cpu":
        theirs = torch.nn.LSTM(2, 2, num_layers=3, dropout=0.5).double()
        theirs.load_state_dict(layer.state_dict())
        results = call(x)
        torch.manual_seed(7)
        assert_all_close(results, flat(theirs(x)))
        torch.manual_seed(7)
        directional = torch.autograd.grad(flat(theirs(x))[0].sum(), x)[0].sum()
        torch.testing.assert_close(expected[0].sum(), directional)
    assert torch.equal(flat(layer.eval()(x))[0], flat(layer(x))[0])


def test_reentrant_checkpoint_reproduces_dropout(device):
    layer = nn.GRU(C, H, num_layers=3, dropout=0.5).to(device, torch.float64)
    x = normal(T, B, C, device=device).requires_grad_()
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=True)):
        x.grad = None
        torch.manual_seed(7)
        call(x)[0].square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


# --------------------------------------------------------------------------------------------------
# Simulated cuDNN path: the implementation is once differentiable


def test_simulated_cudnn_is_as_strict_as_cudnn(cudnn):
    layer = torch.nn.LSTM(C, H).double()
    stack = implementation.Recurrence("LSTM", True, 1, False, False)
    x = normal(T, B, C).requires_grad_()
    zeros = [torch.zeros(1, B, H, dtype=torch.float64)] * 2

    def call(train):
        return scalar(implementation.torch_recurrence(stack, x, None, zeros, list(layer.parameters()), 0.0, train))

    (first,) = torch.autograd.grad(call(True), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="training mode"):
        torch.autograd.grad(call(False), x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BOTH)
def test_cudnn_is_used_for_output_and_first_derivatives(cudnn, monkeypatch, name, train):
    """Training uses cuDNN's forward and backward passes; the recurrence is used for further derivatives."""
    _, ours = pair(name)
    ours.train(train)
    calls = []
    recurrence = implementation.recurrence
    monkeypatch.setattr(implementation, "recurrence", lambda *a: calls.append("recurrence") or recurrence(*a))
    x = normal(T, B, C).requires_grad_()
    with torch.no_grad():
        ours(x)
    assert cudnn == ["forward"]
    ours(x)[0].sum().backward()
    assert cudnn == ["forward", "forward", "backward"]
    assert not calls
    torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    assert cudnn == ["forward", "forward", "backward", "forward"]
    assert calls == ["recurrence"]


def test_frozen_weights_and_inputs_receive_no_gradient(cudnn):
    theirs, ours = pair("GRU", num_layers=2)
    x = normal(T, B, C)
    for layer in (theirs, ours):
        layer.requires_grad_(False)
        layer.weight_hh_l1.requires_grad_()
        layer(x)[0].square().sum().backward()
    assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in theirs.parameters()]
    torch.testing.assert_close(ours.weight_hh_l1.grad, theirs.weight_hh_l1.grad)


def test_freed_graphs_and_inplace_modifications_raise_as_in_torch(cudnn):
    _, ours = pair("LSTM")
    x = normal(T, B, C).requires_grad_()
    loss = ours(x)[0].sum()
    loss.backward(retain_graph=True)
    kept = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * kept)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
    loss = ours(x)[0].sum()
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loss_does_not_hold_activations_after_backward(cudnn):
    _, ours = pair("LSTM")
    loss = ours(normal(T, B, C).requires_grad_())[0].sum()
    node = loss.grad_fn.next_functions[0][0]
    held = weakref.ref(node.inner[1][0].node)
    assert "_SimulatedCudnn" in held().name()
    loss.backward()
    assert held() is None


def test_batched_gradients(cudnn):
    theirs, ours = pair("GRU", num_layers=2)
    x = normal(T, B, C).requires_grad_()
    output = ours(x)[0]
    grads = normal(2, *output.shape)
    (results,) = torch.autograd.grad(output, x, grads, is_grads_batched=True)
    assert_all_close(results, [torch.autograd.grad(theirs(x)[0], x, grad)[0] for grad in grads])


@pytest.mark.parametrize("name", BOTH)
def test_non_reentrant_checkpoint(device, name):
    theirs, ours = pair(name, device, num_layers=2)

    class Checkpointed(torch.nn.Module):
        mode = name

        def forward(self, x, hx):
            return checkpoint(ours, x, use_reentrant=False)

        def parameters(self):
            return ours.parameters()

    x = normal(T, B, C, device=device)
    with torch.backends.cudnn.flags(enabled=False):
        expected = derivatives(theirs, x)
    assert_all_close(derivatives(Checkpointed(), x), expected)


# --------------------------------------------------------------------------------------------------
# Low precision, compiled and exported


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_autocast(device, name, dtype):
    """Under autocast, torch's LSTM raises on CPUs without oneDNN support; fastgen's computes in the lower dtype."""
    theirs, ours = pair(name, device, torch.float32, num_layers=2)
    x = torch.randn(T, B, C, device=device)
    plain = copy.deepcopy(theirs).to(dtype)
    exact = derivatives(theirs.double(), x.double())
    with torch.backends.cudnn.flags(enabled=False):
        rough = derivatives(plain, x.to(dtype))
    with torch.autocast(device.type, dtype=dtype):
        results = derivatives(ours, x)
        tangent = torch.func.jvp(lambda x: ours(x)[0], (x,), (torch.ones_like(x),))[0]
    assert tangent.dtype == results[0].dtype
    for index, (result, low, wanted) in enumerate(zip(results, rough, exact, strict=True)):
        assert_accurate(result.to(dtype), low, wanted, str(index), allowance=torch.finfo(dtype).eps)
    if name == "LSTM" or implementation.accelerated(device):
        assert results[0].dtype == dtype
    assert all(r.dtype == torch.float32 for r in results[-len(list(ours.parameters())) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_second_derivatives_in_half_precision(device, name, dtype):
    theirs, ours = pair(name, device, dtype, num_layers=2)
    x = torch.randn(3 * T, B, C, device=device, dtype=dtype)
    with torch.backends.cudnn.flags(enabled=False):
        rough = derivatives(theirs, x)
        exact = derivatives(theirs.double(), x.double())
    for index, (result, low, wanted) in enumerate(zip(derivatives(ours, x), rough, exact, strict=True)):
        assert_accurate(result, low, wanted, str(index), allowance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_autocast_dtypes_match_torch(name, packed):
    theirs, ours = pair(name, dtype=torch.float32)
    x = torch.randn(T, B, C)
    sequence = pack_padded_sequence(x, [T, T, 2]) if packed else x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = flat(theirs(sequence))
        except RuntimeError:
            pytest.skip("oneDNN has no LSTM in bfloat16 for this processor")
        for a, b in zip(flat(ours(sequence)), expected, strict=True):
            assert a.dtype == b.dtype


def test_compile(device):
    """As in torch, torch.compile breaks the graph at recurrent layers unless allow_rnn is set."""
    _, ours = pair("LSTM", device)
    x = normal(2, B, C, device=device)
    f = lambda x: scalar(flat(ours(x)))  # noqa: E731
    inputs = [x.clone().requires_grad_(), *ours.parameters()]
    expected = torch.autograd.grad(f(inputs[0]), inputs)
    torch._dynamo.reset()
    left_out = torch.compile(f, backend="aot_eager")
    assert_all_close(torch.autograd.grad(left_out(inputs[0]), inputs), expected)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        whole = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert_all_close(torch.autograd.grad(whole(inputs[0]), inputs), expected)


@pytest.mark.parametrize("name", BOTH)
def test_export(name):
    _, ours = pair(name, num_layers=2, bidirectional=True)
    x = normal(T, B, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the assigned list of weights, as for torch's layers
        program = torch.export.export(ours, (x,), strict=True)
    assert_all_close(flat(program.module()(x)), flat(ours(x)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", BOTH)
def test_cudnn_double_backward_raises_in_torch_and_works_here(name):
    theirs, ours = pair(name, "cuda", num_layers=2)
    x = normal(T, B, C, device="cuda").requires_grad_()
    for layer, works in ((theirs, False), (ours, True)):
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        if works:
            first.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="_cudnn_rnn_backward"):
                first.sum().backward()
