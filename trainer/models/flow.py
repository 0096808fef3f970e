"""Normalising flows and their mixture, MixFlow: exact likelihood, exact inverse, samples with gradients.

This file imports only torch, the standard library and its neighbours: with these it travels in a registered model.

References:
    W. Gong, Wasserstein Generative Adversarial Network, MPhil thesis, Cambridge 2017 (chapters 3 and 4).
    L. Dinh, D. Krueger, Y. Bengio, NICE, 2014; L. Dinh, J. Sohl-Dickstein, S. Bengio, Real NVP, 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.coupling import MLP, ConvNet, ImageFlow, VectorFlow
from trainer.models.mixing import MixingWeights

_SAMPLES_AT_ONCE = 4096


class Flow(nn.Module):
    """Mixture of T flows, p(x) = Σ_c π_c p(z_c) |det dz_c/dx| (thesis eq. 4.1, 4.2); T = 1 is a single flow.

    From the data to the base: the logit of pixels (where `logit` is set), an affine layer of each component
    (`affine`), couplings, and the diagonal scaling S of NICE. All components are computed together. Before training
    the flow is the affine layer alone, as the last layers of all networks are zero.

    Parameters (shapes): `mixing.logits` [T], `log_scale` [T, d] (log S), `shift` and `log_width` [T, d] (the affine
    layer, (x - shift) / exp(log_width)), `lower` [T, d, d] and `log_diagonal` [T, d] (where it is full, the triangular
    matrix that follows: d times what is below the diagonal, and the diagonal's logarithm), and those of the coupling
    networks.

    The mixing coefficients and their priors are those of `MixingWeights`; where they are learnt by EM, `forward` in
    training mode moves them.

    Args:
        shape: of a sample: [n_features], or [height, width, channels] (channels may be missing).
        n_components: T.
        n_couplings: coupling layers; for `network` "conv", of each of the two masks at each scale.
        coupling: "additive" (NICE) or "affine" (Real NVP).
        network: coupling networks: "mlp" on features of even and odd number, or "conv" on images.
        width: units or channels of a hidden layer.
        n_layers: hidden layers; residual blocks of "conv".
        residual: hidden layers of "mlp" add to what enters them.
        base: "gaussian" or "logistic" (standard).
        affine: "none", "diagonal" (shift and width of each feature), or "full" (a triangular matrix as well).
        logit: α of y = logit(α + (1 - 2 α) x) for data in [0, 1]; None leaves the data as they are.
        weights, weight_rate, weight_start, entropic_weight, stick_breaking, n_train: of the mixing coefficients; see
            `MixingWeights`.
        precision: of the networks' matrix products in training mode, "float32" or "bfloat16" (float32 where the machine
            has no instructions for it); in evaluation mode all is float32.

    Raises:
        ValueError: sizes or options that make no flow.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_components: int = 1,
        n_couplings: int = 4,
        coupling: Literal["additive", "affine"] = "additive",
        network: Literal["mlp", "conv"] = "mlp",
        width: int = 100,
        n_layers: int = 2,
        residual: bool = False,
        base: Literal["gaussian", "logistic"] = "gaussian",
        affine: Literal["none", "diagonal", "full"] = "diagonal",
        logit: float | None = None,
        weights: Literal["gradient", "em"] = "gradient",
        weight_rate: float = 0.05,
        weight_start: int = 0,
        entropic_weight: float = 0.0,
        stick_breaking: float | None = None,
        n_train: int = 1,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self._config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.shape = tuple(int(size) for size in shape)
        self._config["shape"] = list(self.shape)
        if not self.shape or min(*self.shape, n_components, width, n_train) < 1 or min(n_couplings, n_layers) < 0:
            raise ValueError(
                "a flow needs a shape, n_components, width and n_train >= 1, n_couplings and n_layers >= 0"
            )
        for name, value, known in (
            ("coupling", coupling, ("additive", "affine")),
            ("network", network, ("mlp", "conv")),
            ("base", base, ("gaussian", "logistic")),
            ("affine", affine, ("none", "diagonal", "full")),
            ("precision", precision, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not {value!r}")
        self.n_features, self.n_components, self.affine = math.prod(self.shape), n_components, affine
        self.base, self.logit = base, logit
        self.mixing = MixingWeights(
            n_components, weights, weight_rate, weight_start, entropic_weight, stick_breaking, n_train
        )
        t, d = n_components, self.n_features
        # Components that start at the same place must differ, or they stay together.
        start = 0.1 if t > 1 and affine == "none" else 0.0

        def mlp(n_in: int, n_out: int) -> nn.Module:
            return MLP(t, n_in, n_out, width, n_layers, residual, start)

        def conv(n_in: int, n_out: int) -> nn.Module:
            return ConvNet(t, n_in, n_out, width, max(1, n_layers), start)

        half, scaled = precision == "bfloat16", coupling == "affine"
        self.body: VectorFlow | ImageFlow
        if network == "mlp":
            self.body = VectorFlow(d, mlp, n_couplings, scaled, half)
        elif len(self.shape) in (2, 3):
            height, columns, channels = (*self.shape, 1)[:3]
            self.body = ImageFlow((height, columns, channels), conv, n_couplings, scaled, half)
        else:
            raise ValueError(f"convolutional couplings are for images, not for samples of shape {list(self.shape)}")
        self.log_scale = nn.Parameter(torch.zeros(t, d))
        if affine != "none":
            self.shift = nn.Parameter(torch.zeros(t, d))
            self.log_width = nn.Parameter(torch.zeros(t, d))
        if affine == "full":
            self.lower = nn.Parameter(torch.zeros(t, d, d))
            self.log_diagonal = nn.Parameter(torch.zeros(t, d))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return dict(self._config)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._config.items())

    @property
    def mixing_coefficients(self) -> Tensor:
        """Mixing coefficients π, [T] float64; they sum to one."""
        return self.mixing.coefficients

    @property
    def live_components(self) -> Tensor:
        """Numbers of the components that are not pruned, int64; see `MixingWeights`."""
        return self.mixing.live

    @torch.no_grad()
    def set_affine(self, mixing: Tensor, shift: Tensor, width: Tensor, triangle: Tensor | None = None) -> None:
        """Sets π [T] and the affine layers: `shift` and `width` [T, d], after `logit`.

        `triangle` [T, d, d], where the layer is full, is lower triangular with a positive diagonal.

        Raises:
            ValueError: the flow has no affine layer.
        """
        if self.affine == "none":
            raise ValueError("this flow has no affine layer")
        self.mixing.set(mixing)
        self.shift.copy_(shift)
        self.log_width.copy_(width.log())
        if triangle is not None:
            self.log_diagonal.copy_(triangle.diagonal(dim1=1, dim2=2).log())
            self.lower.copy_(triangle.tril(-1) * self.n_features)

    def preprocess(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the affine layers, [batch, d], and log |det dy/dx| [batch]: -inf outside of the support."""
        if self.logit is None:
            return x, x.new_zeros(len(x))
        # Both tails of their own: 1 - p would have lost the digits of what is near 1.
        p, q = (self.logit + (1 - 2 * self.logit) * part for part in (x, 1 - x))
        outside = ((p <= 0) | (q <= 0)).any(1)
        tiny = torch.finfo(x.dtype).tiny
        log_p, log_q = p.clamp_min(tiny).log(), q.clamp_min(tiny).log()
        log_det = self.n_features * math.log(1 - 2 * self.logit) - (log_p + log_q).sum(1)
        return log_p - log_q, log_det.masked_fill(outside, -math.inf)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every component's code of x [batch, ...]: z [T, batch, d], and log |det dz/dx| [T, batch].

        Raises:
            ValueError: x does not have n_features values per sample.
        """
        flat = x.flatten(1).to(self.log_scale.dtype)
        if flat.shape[1] != self.n_features:
            raise ValueError(f"samples have {flat.shape[1]} features, the model has {self.n_features}")
        y, log_det = self.preprocess(flat)
        h = y.expand(self.n_components, *y.shape)
        constant = self.log_scale.sum(1)
        if self.affine != "none":
            h = (h - self.shift.unsqueeze(1)) * (-self.log_width).exp().unsqueeze(1)
            if self.affine == "full":
                h = torch.bmm(h, self._triangle().mT)
                constant = constant + self.log_diagonal.sum(1)
            constant = constant - self.log_width.sum(1)
        z, by_couplings = self.body(h)
        return z * self.log_scale.exp().unsqueeze(1), log_det + by_couplings + constant.unsqueeze(1)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log π_c + log p(x | c) in nats, [batch, T], for x [batch, ...]."""
        return self._joint(*self.latents(x))

    def _joint(self, z: Tensor, log_det: Tensor) -> Tensor:
        if self.base == "gaussian":
            log_base = -0.5 * z.square().sum(-1) - 0.5 * self.n_features * math.log(2 * math.pi)
        else:
            log_base = (z - 2 * F.softplus(z, threshold=40)).sum(-1)
        return (log_base + log_det).T + self.mixing.log()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, [batch], for x [batch, ...]; of x itself, also where there is a logit."""
        return self.component_log_prob(x).logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities p(c | x), [batch, T]; π where x has no density."""
        return self._posterior(self.component_log_prob(x))

    def _posterior(self, joint: Tensor) -> Tensor:
        nowhere = joint.amax(1, keepdim=True) == -math.inf
        return torch.where(nowhere, self.mixing.log().exp(), joint.masked_fill(nowhere, 0.0).softmax(1))

    def log_prior(self) -> Tensor:
        """Log-density of the mixing coefficients under their prior, up to a constant, in nats; zero without one."""
        return self.mixing.log_prior()

    def forward(self, x: Tensor | None, n: int = 0, *, component: Tensor | None = None) -> Any:
        """Everything that training needs, in one call that engines can wrap.

        Args:
            x: data [batch, ...], or None.
            n: samples to draw, by torch's own generator.
            component: [batch] int64, the components that x is known to come from.

        Returns:
            (log p(x) [batch], log-prior []), of log p(x, c) where the component is given, and None without x. Where
            n > 0 also samples [n, d], through which gradients reach all parameters but the weights, and their
            components [n] int64.
        """
        log_prior, log_prob = self.log_prior(), None
        if x is not None:
            joint = self.component_log_prob(x)
            if component is None:
                log_prob = joint.logsumexp(1)
            else:
                log_prob = joint.gather(1, component.unsqueeze(1)).squeeze(1)
            if self.mixing.by_em and self.training and torch.is_grad_enabled():
                known = None if component is None else F.one_hot(component, self.n_components)
                self.mixing.learn(self._posterior(joint.detach()) if known is None else known)
        if n == 0:
            return log_prob, log_prior
        return log_prob, log_prior, *self._draw(n, None)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n samples [n, d]."""
        parts = [min(_SAMPLES_AT_ONCE, n - start) for start in range(0, n, _SAMPLES_AT_ONCE)]
        drawn = [self._draw(part, generator)[0] for part in parts]
        return torch.cat(drawn) if drawn else self.log_scale.new_zeros(0, self.n_features)

    def encode(self, x: Tensor) -> Tensor:
        """The most probable component's number and the code in it, [batch, 1 + d], for x [batch, ...]."""
        z, log_det = self.latents(x)
        component = self._joint(z, log_det).argmax(1)
        code = z[component, torch.arange(len(x), device=z.device)]
        return torch.cat([component[:, None].to(z.dtype), code], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """x [batch, d] of codes [batch, 1 + d] as `encode` gives them.

        Raises:
            ValueError: another width, or a first column that is no component.
        """
        if codes.shape[1] != 1 + self.n_features:
            raise ValueError(f"codes have {codes.shape[1]} columns: give {1 + self.n_features}, the component and z")
        component = codes[:, 0].long()
        if not bool(((component == codes[:, 0]) & (component >= 0) & (component < self.n_components)).all()):
            raise ValueError(f"the first column of codes is a component, 0 to {self.n_components - 1}")
        return self.generate(codes[:, 1:].to(self.log_scale.dtype), component)

    def generate(self, z: Tensor, component: Tensor) -> Tensor:
        """x [n, d] of codes z [n, d], each by its own component [n] int64: the exact inverse of `latents`."""
        counts = torch.bincount(component, minlength=self.n_components)
        order = component.argsort()
        first = (counts.cumsum(0) - counts)[component[order]]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - first
        # Every component's codes in rows of its own, filled up with zeros to the longest.
        rows = z.new_zeros(self.n_components, int(counts.max()) if len(z) else 0, self.n_features)
        h = self.body.inverse(rows.index_put((component, place), z) * (-self.log_scale).exp().unsqueeze(1))
        if self.affine != "none":
            if self.affine == "full":
                h = torch.linalg.solve_triangular(self._triangle().mT, h, upper=True, left=False)
            h = h * self.log_width.exp().unsqueeze(1) + self.shift.unsqueeze(1)
        y = h[component, place]
        return y if self.logit is None else (y.sigmoid() - self.logit) / (1 - 2 * self.logit)

    def _triangle(self) -> Tensor:
        """The full affine layer's matrix, [T, d, d]."""
        # A step of the optimiser in all of a row then moves an output as much as one in its shift.
        return (self.lower / self.n_features).tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def _draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        mixing = self.mixing_coefficients.detach()
        component = torch.multinomial(mixing, n, replacement=True, generator=generator)
        options: Any = {"generator": generator, "dtype": self.log_scale.dtype, "device": self.log_scale.device}
        if self.base == "gaussian":
            z = torch.randn(n, self.n_features, **options)
        else:
            # Uniform numbers lie on a grid: a zero stands for what is below half of its step.
            half = torch.finfo(self.log_scale.dtype).eps / 4
            z = torch.rand(n, self.n_features, **options).clamp_min(half).logit()
        return self.generate(z, component), component


MODEL = Flow
