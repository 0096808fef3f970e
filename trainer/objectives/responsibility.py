"""Responsibility learning: a generator with a latent mixture, its discriminator, and a classifier of the Gaussians.

Source: W. Huang, R. Y. D. Xu, S. Jiang, X. Liang, I. Oppermann, GAN-based Gaussian Mixture Model Responsibility
Learning, ICPR 2020 (Algorithm 1, equations 3 to 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.gan import Generator, halvings
from trainer.objectives import Batch, Player, averaging_decay
from trainer.objectives.adversarial import real_penalty
from trainer.objectives.transport import squared_distances

Loss = Literal["minimax", "non-saturating"]
Pairs = Literal["independent", "augmented", "nearest"]
Agreement = Literal["information", "invariance"]
Generated = Literal["all", "drawn"]

# Of the random affine maps that augment images: radians, shear, log of the size, and share of half a side.
_TURN, _SHEAR, _GROWTH, _SHIFT = 0.25, 0.15, 0.15, 0.15
_JITTER = 0.1  # of other samples, in standard deviations
# Weights in `invariance_loss`: of certainty and balance beside invariance, and of balance beside certainty.
_CERTAINTY, _BALANCE = 0.1, 4.0
# Decay of the shares of the Gaussians that the prior keeps: they are those of some 200 batches.
_MEMORY = 0.995


class Decoder(nn.Module):
    """The call of a generator that engines wrap: latent points [n, n_latent] to samples [n, n_features]."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor) -> Tensor:
        return self.generator.decode(z)


class ResponsibilityLearning:
    """Algorithm 1, on a batch of M samples x_i and K images x̂_i^k = G(σ_k ε_ik + μ_k) of each.

    With f = logit D, w_i = C(x_i), the responsibilities, and s the softplus, a step moves, in this order,

        D          on -L_a = (1/K) E_i Σ_k w_ik (s(-f(x_i)) + s(f(x̂_i^k)))                              eq. 6
        G          on the part of L_a that is its own, -(1/K) E_i Σ_k w_ik s(f(x̂_i^k))                  eq. 6
        C          on L_a, through w_i alone                                                            eq. 6
        C          on -I(C(x_i), C(x̂_i^k))                                                              eq. 5
        C, μ, σ    on -I(p(· | z_i^k), C(x̂_i^k)), with p(k | z) of eq. 3                                eq. 4

    How the printed equations are read:

    - Eq. 3 has equal weights of the Gaussians.
    - I is the mutual information, in nats, of the K x K joint distribution of two assignments: the mean over all pairs
      of the outer products of their probabilities. It is maximised. The sum over k of eqs. 4 and 5 stands inside, as
      part of that mean: for one k alone p(· | z_k) is all but constant, and constants share no information.
    - Eq. 5 of real images and images generated independently of them is zero in the limit of large batches, whatever
      C is (`pairs` "independent", the letter); of a batch it is a little above, and most where C is certain. A pair
      that belongs together is an image and a random affine map of it, for vectors noise on it ("augmented"); or a real
      and the "nearest" generated image of the worker's share of the batch.
    - In eq. 6 the weights are constant in the gradients of D and G. C then moves by them alone: it shifts weight to
      the Gaussian whose images D takes for real, of any x_i alike, as x̂_i^k does not depend on x_i; unless
      each Gaussian has an f of its own (below).
    - "Update both" is a simultaneous update: its players' gradients are of one point, though they move one by one. G's
      images are made anew once it has moved, for eq. 4; eqs. 5 and 6 share those that D saw.

    To the letter, a Gaussian that lost its weight gets no gradient from eq. 6, and information does not say which
    number C gives to which Gaussian. What helps:

    - `agreement` "invariance", in place of eq. 5: E KL(C(x) || C(x')) + 0.1 (E H(C(x)) - 4 H(E C(x))) of augmented
      pairs, where C(x) of the first term is held constant (W. Hu et al., Learning Discrete Representations via
      Information Maximizing Self-Augmented Training, ICML 2017). Clusters of eq. 5 depend on where C starts. The last
      term asks for equally many images of each Gaussian.
    - `uniform_share` u: (1 - u) w_i + u / K in place of w_i in eq. 6. With u = 1 weights are those of DeLiGAN. With a
      discriminator for each, every Gaussian is also asked for that share of all data.
    - `label_steps`: in so many first steps (None: in all) -log C(x̂_i^k)_k is added to eq. 4.
    - `classifier_consistency` λ: C takes λ times its loss of eq. 4, so that it leads G rather than follow it: where G
      draws one digit from two Gaussians, eq. 4 asks C to tell them apart.
    - `generator_consistency` λ: G also pays λ times that loss of eq. 4 (as in InfoGAN; Chen et al. 2016). Beside the
      adversarial loss, of which eq. 6 takes a K-th, that is a weight of λ K.
    - `real_penalty` γ: D also pays γ/2 E|∇f(x_i)|², here a K-th of it, as of eq. 6 (R1; see `real_penalty`); of a
      discriminator for each, of Σ_k w_ik f_k(x_i), or of the f_k that is drawn, which in expectation is no less.
      Without it the images of a Gaussian soon differ hardly. Of a shared encoder it is taken where that has moved.
    - a discriminator for each Gaussian: D gives 1 + K values, a common one and what each Gaussian adds to it, and L_a
      has D(x, k), f_k, in place of D(x), f. The weights of its real part, which else sum to one, then ask f_k about the
      images that C gives to Gaussian k, and G about all the forms that these have (of pairs of an image and its class:
      T. Miyato, M. Koyama, cGANs with Projection Discriminator, ICLR 2018). Without it, `generator_consistency` asks of
      every Gaussian the images that C is surest of, which are much alike.
    - `loss` "non-saturating": G pays (1/K) E_i Σ_k w_ik s(-f(x̂_i^k)).
    - `classifier_adversarial` false: C does not move by eq. 6.
    - a prior of unit deviations (`LatentPrior`).
    - `generated` "drawn": one image x̂_i^k of each x_i, whose k is drawn by the weights w_i, in place of all K. Eq. 6
      keeps its expectation, and G costs a K-th. Eq. 4 is of the drawn ones: of Gaussians as C weighs them, not of all
      alike, and a Gaussian without weight is not in it.

    The prior keeps the Gaussians' shares, a running mean of the weights of eq. 6: D sees generated images in these, and
    so does who draws from the model. Eq. 3 stays as it is.

    Joint distributions are of the batch of all workers together, so that N workers have the gradients of one; but for
    "nearest".

    Args:
        players: `model` (a `Decoder`), `prior`, `classifier`, `discriminator` (whose network gives [n, 1], or
            [n, 1 + K]) and, where the two share one, `encoder`, which moves with either.
        loss, pairs, agreement, generated, uniform_share, classifier_adversarial, label_steps, classifier_consistency,
            generator_consistency, real_penalty: see above; without `pairs` eq. 5 is left out; with "drawn" C cannot
            move by eq. 6.
    """

    def __init__(
        self,
        players: dict[str, Player],
        *,
        loss: Loss = "minimax",
        pairs: Pairs | None = "independent",
        agreement: Agreement = "information",
        generated: Generated = "all",
        uniform_share: float = 0.0,
        classifier_adversarial: bool = True,
        label_steps: int | None = 0,
        classifier_consistency: float = 1.0,
        generator_consistency: float = 0.0,
        real_penalty: float = 0.0,
    ) -> None:
        self.players = players
        self.networks: dict[str, Callable[..., Any]] = {name: player.module for name, player in players.items()}
        self.kind, self.pairs, self.agreement, self.uniform_share = loss, pairs, agreement, uniform_share
        self.generated = generated
        self.classifier_adversarial, self.label_steps = classifier_adversarial, label_steps
        self.classifier_consistency, self.generator_consistency = classifier_consistency, generator_consistency
        self.real_penalty = real_penalty
        self.shares_encoder = "encoder" in players
        self._labels, self._step = label_steps is None or label_steps > 0, 0
        self._plan: list[tuple[str, str]] = []
        self._kept: dict[str, Tensor] = {}

    def turns(self, step: int) -> Sequence[str]:
        encoder = ("encoder",) if self.shares_encoder else ()
        discriminator, classifier = (*encoder, "discriminator"), (*encoder, "classifier")
        self._plan = [("adversarial", player) for player in (*discriminator, "model")]
        if self.classifier_adversarial:
            self._plan += [("assignment", player) for player in classifier]
        if self.pairs is not None:
            self._plan += [("agreement", player) for player in classifier]
        learns = classifier if self.classifier_consistency else ()
        self._plan += [("consistency", player) for player in ("prior", *learns)]
        self._labels, self._step, self._kept = self.label_steps is None or step < self.label_steps, step, {}
        return [player for _, player in self._plan]

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].flatten(1)
        phase = "consistency" if player in ("prior", "classifier") else "adversarial"
        if self._plan and self._plan[0][1] == player:
            phase = self._plan.pop(0)[0]
            if player == "prior":
                self._keep_shares(x)
        else:  # out of turn, where an engine makes its moments
            self._plan, self._kept = [], {}
        if phase == "assignment":
            return self._assignment(player, x)
        if phase == "agreement":
            return self._agreement(player, x)
        if phase == "consistency":
            return self._consistency(player, x)
        return self._generator(x) if player == "model" else self._discrimination(player, x)

    def _discrimination(self, player: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights, fake = self._of_step("weights", x), self._of_step("fake", x)
        values = self._ask("discriminator", player, torch.cat([x, fake]), "adversarial")
        of_real, of_fake = self._judged(values[: len(x)]), self._judged(values[len(x) :])
        share = self._of_step("responsibilities", x).mean(0)
        loss = -adversarial_loss(of_real, of_fake, weights, len(share))
        # How many Gaussians the data is assigned to: the exponential of the entropy of their shares.
        scalars = {"gaussians": torch.special.entr(share).sum().exp()}
        if self.real_penalty:
            # The bare networks: DeepSpeed's wrapper cannot be differentiated twice.
            names = ("encoder", "discriminator") if self.shares_encoder else ("discriminator",)
            judge = nn.Sequential(*(self.players[name].module for name in names))
            penalty = real_penalty(lambda x: (weights * self._judged(judge(x))).sum(1), x)
            loss = loss + self.real_penalty * penalty / len(share)
            scalars["penalty"] = penalty.detach()
        return loss, scalars

    def _generator(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights, z = self._of_step("weights", x), self._of_step("z", x)
        fake = self.networks["model"](z.flatten(0, 1))
        values = self._judged(self._ask("discriminator", "model", fake))
        paid = F.softplus(-values) if self.kind == "non-saturating" else -F.softplus(values)
        adversarial = (weights * paid).sum(1).mean() / self._of_step("responsibilities", x).shape[1]
        if not self.generator_consistency:
            return adversarial, {}
        logits = self._ask("classifier", "model", fake)
        consistency, scalars = self._consistency_loss(self._of_step("log_posterior", x).flatten(0, 1), logits, x)
        return adversarial + self.generator_consistency * consistency, {**scalars, "adversarial": adversarial.detach()}

    def _assignment(self, player: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if "of_real" not in self._kept:
            with torch.no_grad():
                values = self._ask("discriminator", "model", torch.cat([x, self._of_step("fake", x)]))
            self._kept["of_real"] = self._judged(values[: len(x)])
            self._kept["of_fake"] = self._judged(values[len(x) :])
        weights = self._mixed(self._ask("classifier", player, x, "assignment").softmax(1))
        return adversarial_loss(self._kept["of_real"], self._kept["of_fake"], weights, weights.shape[1]), {}

    def _agreement(self, player: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if "others" not in self._kept:
            self._kept["others"] = self._others(x)
        others = self._kept["others"]
        logits = self._ask("classifier", player, torch.cat([x, others]), "agreement")
        if self.agreement == "invariance":
            loss = invariance_loss(logits[: len(x)], logits[len(x) :])
            return loss, {"invariance": loss.detach()}
        of_x, of_others = logits[: len(x)].softmax(1), logits[len(x) :].softmax(1)
        if len(others) != len(x):
            of_others = of_others.view(len(x), -1, of_others.shape[1]).mean(1)  # the mean of outer products with of_x
        information = mutual_information(mean_over_ranks(of_x.T @ of_others / len(x)))
        return -information, {"agreement": information.detach()}

    @torch.no_grad()
    def _others(self, x: Tensor) -> Tensor:
        """The partners of x for eq. 5: one of each [M, d], or K of each [M K, d]."""
        if self.pairs == "augmented":
            return self._augmented(x)
        fake = self._of_step("fake", x)
        return fake[squared_distances(x, fake).argmin(1)] if self.pairs == "nearest" else fake

    def _consistency(self, player: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "prior" or "moved" not in self._kept:
            z, log_posterior = self.networks["prior"](self._of_step("noise", x), self._kept["component"])
            fake, log_posterior = self.networks["model"](z.flatten(0, 1)), log_posterior.flatten(0, 1)
            self._kept["moved"], self._kept["moved_posterior"] = fake.detach(), log_posterior.detach()
        if player != "prior":
            fake, log_posterior = self._kept["moved"], self._kept["moved_posterior"]
        logits = self._ask("classifier", player, fake, "consistency")
        loss, scalars = self._consistency_loss(log_posterior, logits, x)
        return loss if player == "prior" else self.classifier_consistency * loss, scalars

    def _consistency_loss(self, log_posterior: Tensor, logits: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the images generated beside x, those of one sample in a row."""
        joint = log_posterior.exp().T @ logits.softmax(1) / len(logits)
        information = mutual_information(mean_over_ranks(joint))
        scalars = {"consistency": information.detach()}
        if not self._labels:
            return -information, scalars
        return F.cross_entropy(logits, self._of_step("component", x).flatten()) - information, scalars

    def _ask(self, head: str, player: str, x: Tensor, name: str = "") -> Tensor:
        """What `head` says of samples x [n, d]: [n, 1] or [n, K].

        Where its encoder moves first on the same loss, the head learns from the features before that move.
        """
        if not self.shares_encoder:
            return self.networks[head](x)
        if player == head and name in self._kept:
            return self.networks[head](self._kept.pop(name))
        features = self.networks["encoder"](x)
        if player == "encoder":
            self._kept[name] = features.detach()
        return self.networks[head](features)

    @torch.no_grad()
    def _keep_shares(self, x: Tensor) -> None:
        """Moves the prior's shares towards those that eq. 6 weighs the Gaussians by."""
        prior: Any = self.players["prior"].module
        shares = self._of_step("responsibilities", x).mean(0)
        if dist.is_initialized():
            # Not `mean_over_ranks`, which leaves each rank's own rounding.
            dist.all_reduce(shares)
        prior.shares.lerp_(shares / shares.sum(), 1 - averaging_decay(_MEMORY, self._step))

    def _judged(self, values: Tensor) -> Tensor:
        """Of D's values for all samples [M, ·] or all their images [M n, ·], the logits that eq. 6 weighs, [M, 1 or n].

        One discriminator gives a value, and a sample's counts for all its n Gaussians. One for each gives 1 + K: what
        they share, and what each adds to it; they are asked as the Gaussian at hand.
        """
        component = self._kept["component"]
        is_of_images = len(values) == component.numel()
        if values.shape[1] == 1:
            return values.view_as(component) if is_of_images else values
        logits = values[:, 1:] + values[:, :1]
        if is_of_images:
            return logits.gather(1, component.reshape(-1, 1)).view_as(component)
        return logits.gather(1, component)

    @torch.no_grad()
    def _of_step(self, name: str, x: Tensor) -> Tensor:
        """What all turns of a step share: k, ε, z, log p(· | z), x̂, C(x) as it was, mixed, and the weights of eq. 6."""
        if name not in self._kept:
            prior: Any = self.players["prior"].module
            responsibilities = self._mixed(self._ask("classifier", "model", x).softmax(1))
            if self.generated == "drawn":
                component = self._drawn(responsibilities)
                weights = torch.ones_like(responsibilities[:, :1]) + 0 * responsibilities.sum(1, keepdim=True)
            else:
                component = torch.arange(responsibilities.shape[1], device=x.device).expand(len(x), -1)
                weights = responsibilities
            noise = self._noise(len(x), component.shape[1], prior.means.shape[1]).to(x)
            z, log_posterior = self.networks["prior"](noise, component)
            fake = self.networks["model"](z.flatten(0, 1))
            self._kept |= {"component": component, "noise": noise, "z": z, "log_posterior": log_posterior}
            self._kept |= {"fake": fake, "responsibilities": responsibilities, "weights": weights}
        return self._kept[name]

    def _mixed(self, responsibilities: Tensor) -> Tensor:
        return torch.lerp(
            responsibilities, torch.full_like(responsibilities, 1 / responsibilities.shape[1]), self.uniform_share
        )

    def _noise(self, n: int, n_components: int, n_latent: int) -> Tensor:
        return torch.randn(n, n_components, n_latent)

    def _drawn(self, responsibilities: Tensor) -> Tensor:
        # What is not finite is drawn from all alike: the loss is then not finite, of which the loop tells all workers.
        return torch.multinomial(responsibilities.nan_to_num(1.0), 1)

    def _augmented(self, x: Tensor) -> Tensor:
        generator: Any = self.players["model"].module.generator
        if not halvings(generator.shape):
            return x + _JITTER * generator.scale * torch.randn_like(x)
        return affine_images(x, generator.shape, torch.rand(len(x), 6).to(x))


def adversarial_loss(of_real: Tensor, of_fake: Tensor, weights: Tensor, n_components: int) -> Tensor:
    """(1/K) E_i Σ_k w_ik (log D(x_i) + log(1 - D(x̂_i^k))), a scalar in nats (eq. 6).

    For logits of D: `of_real` [M, 1], or [M, n] of a discriminator for each, and `of_fake` [M, n]; weights
    [M, n], where n is K or, of drawn Gaussians, less.
    """
    return -(weights * (F.softplus(-of_real) + F.softplus(of_fake))).sum(1).mean() / n_components


def mutual_information(joint: Tensor) -> Tensor:
    """Σ_ab p(a, b) log(p(a, b) / (p(a) p(b))), in nats, of a joint distribution [A, B] (eq. 5)."""
    tiny = torch.finfo(joint.dtype).tiny
    logs = [part.clamp_min(tiny).log() for part in (joint, joint.sum(1, keepdim=True), joint.sum(0, keepdim=True))]
    return (joint * (logs[0] - logs[1] - logs[2])).sum()


def invariance_loss(logits: Tensor, of_others: Tensor) -> Tensor:
    """E KL(p || p') + 0.1 (E H(p) - 4 H(E p)), in nats, of assignments p, p' by their logits [M, K] each.

    p is constant in the gradient of the first term; E p is of all workers (W. Hu et al. 2017).
    """
    logs, probabilities = logits.log_softmax(1), logits.softmax(1)
    divergence = F.kl_div(of_others.log_softmax(1), logs.detach(), reduction="batchmean", log_target=True)
    uncertainty = -(probabilities * logs).sum(1).mean()
    spread = torch.special.entr(mean_over_ranks(probabilities.mean(0)).clamp_min(torch.finfo(logs.dtype).tiny)).sum()
    return divergence + _CERTAINTY * (uncertainty - _BALANCE * spread)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over all workers, whose gradient is this worker's: engines then take the mean of the gradients."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return values + (total / dist.get_world_size() - values.detach())


def affine_images(x: Tensor, shape: Sequence[int], draws: Tensor) -> Tensor:
    """Images x [n, d] of `shape`, turned, sheared, sized and shifted by draws [n, 6] from [0, 1]; ½ leaves them.

    What comes in from outside repeats the border.
    """
    images = x.unflatten(1, (*shape[:2], -1)).permute(0, 3, 1, 2)
    turn, shear, wide, high, right, down = (2 * draws - 1).unbind(1)
    cos, sin = (_TURN * turn).cos(), (_TURN * turn).sin()
    wide, high = (_GROWTH * wide).exp(), (_GROWTH * high).exp()
    rows = [
        torch.stack([cos * wide, (_SHEAR * shear - sin) * wide, _SHIFT * right], 1),
        torch.stack([sin * high, cos * high, _SHIFT * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1).flatten(1)
