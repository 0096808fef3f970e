"""The mathematics on a GPU: the same numbers as on the CPU. Needs torch and numpy; skipped where there is no GPU."""

import pytest
import torch

from trainer.em import fit_em
from trainer.models.inpainting import inpaint
from trainer.models.mfa import MFA
from trainer.settings import EMSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def model_on(device):
    g = torch.Generator().manual_seed(0)
    model = MFA(6, 784, 4)
    loadings = torch.randn(6, 784, 4, generator=g) * 0.1
    model.set_components(torch.ones(6), torch.rand(6, 784, generator=g), loadings, torch.full((6, 784), 0.01))
    return model.to(device)


def test_log_prob_and_gradients_equal_the_cpu():
    x = model_on("cpu").sample(64, torch.Generator().manual_seed(1))
    values, gradients = {}, {}
    for device in ("cpu", "cuda"):
        model = model_on(device)
        log_prob = model.log_prob(x.to(device))
        log_prob.mean().backward()
        values[device] = log_prob.detach().cpu()
        gradients[device] = [p.grad.cpu() for p in model.parameters()]
    assert torch.allclose(values["cpu"], values["cuda"], rtol=1e-4)
    for cpu, cuda in zip(gradients["cpu"], gradients["cuda"], strict=True):
        assert (cpu - cuda).abs().max() < 1e-3 * cpu.abs().max()


def test_sampling_on_the_gpu_is_reproducible():
    model = model_on("cuda")
    first = model.sample(32, torch.Generator("cuda").manual_seed(5))
    assert first.is_cuda
    assert torch.equal(first, model.sample(32, torch.Generator("cuda").manual_seed(5)))


def test_em_equals_the_cpu():
    x = model_on("cpu").sample(500, torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        model = model_on(device)
        with torch.no_grad():
            model.means.add_(0.05)
        records = []
        settings = EMSettings(iterations=4, tolerance=None)
        fit_em(model, lambda: x.split(100), settings, on_iteration=records.append)
        found[device] = records[-1].log_likelihood
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)


@pytest.mark.parametrize("mode", ["map", "mean"])
def test_inpainting_equals_the_cpu(mode):
    x = model_on("cpu").sample(20, torch.Generator().manual_seed(1))
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    cpu = inpaint(model_on("cpu"), x, observed, mode=mode)
    cuda = inpaint(model_on("cuda"), x.cuda(), observed.cuda(), mode=mode).cpu()
    assert torch.allclose(cpu, cuda, atol=1e-4)
