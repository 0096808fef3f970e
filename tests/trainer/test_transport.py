"""Sinkhorn's iterations under autograd: plan, cost and gradient against POT, and against closed forms."""

import pytest
import torch

from trainer.objectives.transport import entropic_transport, sinkhorn_divergence, squared_distances


def sets(n=30, m=40, d=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(m, d, generator=g, dtype=torch.float64) + 1
    a, b = (torch.rand(k, generator=g, dtype=torch.float64) + 0.1 for k in (n, m))
    return x, y, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("distance", ["squared", "L1"])
def test_cost_and_gradient_equal_pot(distance):
    ot = pytest.importorskip("ot")
    x, y, a, b = sets()
    cost = squared_distances(x, y) if distance == "squared" else torch.cdist(x, y, p=1)
    ours = entropic_transport(cost, 0.5, 2000, a, b)
    twin = x.detach().clone().requires_grad_()
    metric = "sqeuclidean" if distance == "squared" else "cityblock"
    options = {"reg": 0.5, "reg_type": "KL", "max_iter": 20_000, "tol": 1e-13, "grad": "autodiff"}
    theirs = ot.solve(ot.dist(twin, y, metric=metric), a, b, **options)
    assert ours.cost.item() == pytest.approx(theirs.value_linear.item(), abs=1e-6)
    assert ours.value.item() == pytest.approx(theirs.value.item(), abs=1e-6)
    assert torch.allclose(ours.plan, theirs.plan, atol=1e-9)
    for mine, reference in ((ours.cost, theirs.value_linear), (ours.value, theirs.value)):
        (gradient,) = torch.autograd.grad(mine, x, retain_graph=True)
        (expected,) = torch.autograd.grad(reference, twin, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-6)


def test_gradient_of_few_iterations_is_that_of_those_iterations():
    """Not the envelope's, which holds at convergence only: Algorithm 4 differentiates what it computed."""
    x, y, _, _ = sets(5, 6, 2)
    assert torch.autograd.gradcheck(lambda z: entropic_transport(squared_distances(z, y), 0.3, 3).cost, x)
    assert torch.autograd.gradcheck(lambda z: sinkhorn_divergence(z, y, 0.3, 3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_regularisation_neither_overflows_nor_vanishes(dtype):
    """exp(-C / ε) is zero in float64 from C / ε = 746 on; here it is up to 10^8. The plan is then the matching's."""
    x = torch.tensor([[0.0], [10.0], [100.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[101.0], [1.0], [11.0]], dtype=dtype)
    found = entropic_transport(squared_distances(x, y), 1e-4, 500)
    assert found.cost.item() == pytest.approx(1, rel=1e-4)
    (gradient,) = torch.autograd.grad(found.cost, x)
    assert torch.allclose(gradient, torch.full_like(x, -2 / 3), rtol=1e-3)


def test_large_regularisation_gives_the_mean_cost():
    x, y, a, b = sets()
    cost = squared_distances(x, y)
    assert entropic_transport(cost, 1e9, 5, a, b).cost.item() == pytest.approx((a @ cost @ b).item(), rel=1e-6)


def test_a_weight_of_zero_takes_a_sample_out():
    x, y, a, b = sets()
    whole = squared_distances(x, y)
    a = torch.cat([a, a.new_zeros(1)])
    padded = torch.cat([whole, whole.new_full((1, len(y)), 7.0)])
    ours, without = entropic_transport(padded, 0.5, 200, a, b), entropic_transport(whole, 0.5, 200, a[:-1], b)
    assert ours.value.item() == pytest.approx(without.value.item(), abs=1e-9)
    assert ours.cost.item() == pytest.approx(without.cost.item(), abs=1e-9)


def test_divergence():
    """Zero between a set and itself, where its gradient vanishes too; positive else; |μ - ν|² of a shifted copy."""
    x, y, _, _ = sets()
    same = sinkhorn_divergence(x, x.detach(), 2.0, 1000)
    assert same.item() == pytest.approx(0, abs=1e-9)
    assert torch.autograd.grad(same, x)[0].abs().max() < 1e-9
    assert sinkhorn_divergence(x, y, 0.5, 500) > 0.1
    shift = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    assert sinkhorn_divergence(x, x + shift, 0.5, 2000).item() == pytest.approx(10.25, rel=1e-6)


@pytest.mark.parametrize(("shape", "iterations"), [((3,), 5), ((0, 3), 5), ((3, 3), 0)])
def test_what_is_no_problem_of_transport(shape, iterations):
    with pytest.raises(ValueError, match="transport needs"):
        entropic_transport(torch.zeros(shape), 1.0, iterations)
    with pytest.raises(ValueError, match="as many weights"):
        entropic_transport(torch.zeros(3, 3), 1.0, 1, a=torch.ones(2) / 2)
