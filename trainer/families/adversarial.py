"""How a generator of any family is trained against a critic, or by optimal transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from trainer.settings import InitialisationSettings, OptimiserSettings, Settings, TrainingSettings

if TYPE_CHECKING:
    from data.manifest import Manifest
    from trainer.models.gan import Critic
    from trainer.objectives import Objective, Player
    from trainer.objectives.likelihood import MaximumLikelihood

# The critic starts from a seed of its own: adding one leaves the generator's start as it is.
_CRITIC_SEED = 1


class CriticSettings(Settings):
    """The critic's network and its optimiser."""

    n_hidden: int = Field(100, ge=1, description="units of a hidden layer")
    n_layers: int = Field(4, ge=0, description="hidden layers; of images: after the convolutions")
    n_shared: int = Field(0, ge=0, description="first hidden layers that the critics of a mixture share")
    width: int = Field(32, ge=1, description="images: channels of the first convolution, which each stage doubles")
    weight_clip: float | None = Field(None, gt=0, description="largest weight after each update; null never clips")
    optimiser: OptimiserSettings = Field(
        default_factory=lambda: OptimiserSettings(learning_rate=1e-4, beta1=0.5, beta2=0.9)
    )

    @model_validator(mode="after")
    def _shares_what_there_is(self) -> CriticSettings:
        if self.n_shared > self.n_layers:
            raise ValueError(f"n_shared ({self.n_shared}) must not exceed n_layers ({self.n_layers})")
        return self

    def player(self, generator: Any, manifest: Manifest, training: TrainingSettings, outputs: int) -> Player:
        """A new critic of `outputs` values; it sees the samples of a `Generator` on the scale of that one's network."""
        import torch

        from trainer.models.gan import Critic, Generator
        from trainer.models.latent_mixture import LatentMixture
        from trainer.players import make_player

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed + _CRITIC_SEED)
            critic: Critic = Critic(manifest.shape, outputs, self.n_hidden, self.n_layers, self.n_shared, self.width)
        if isinstance(generator, Generator | LatentMixture):
            critic.set_scale(generator.offset, generator.scale)
        elif manifest.levels is not None:
            critic.set_scale(torch.tensor(0.5), torch.tensor(0.5))
        return make_player(critic, self.optimiser, training.steps, weight_clip=self.weight_clip)


class AdversarialSettings(Settings):
    """Generator against critic; the generator's optimiser is training.optimiser."""

    loss: Literal["non-saturating", "minimax", "wasserstein"] = Field("wasserstein", description="of both players")
    critic_steps: int = Field(5, ge=1, description="turns of the critic in a step, which share its batch")
    gradient_penalty: float | None = Field(
        None, gt=0, description="weight of (|∇f| - 1)² between samples and data; null: none"
    )
    real_penalty: float | None = Field(
        None, gt=0, description="weight of |∇f|² / 2 at the data (R1), of one critic; null: none"
    )
    likelihood_weight: float = Field(
        0.0, ge=0, description="weight of the log-likelihood (nats per sample) in the generator's loss; densities only"
    )
    assignment: Literal["single", "posterior", "hard"] = Field(
        "single", description="one critic; or one per component, mixed by the posterior, or that of the likeliest one"
    )
    temperature: float = Field(1.0, gt=0, description="divides the posterior's logits: above 1 smooths assignments")
    posterior_slope: bool = Field(
        False,
        description="assignment=posterior: samples follow the posterior's own slope too, and the penalty bounds it",
    )
    standardise: bool = Field(
        False, description="densities of real numbers: the critic sees them with mean 0 and deviation 1, as pixels are"
    )
    critic: CriticSettings = Field(default_factory=lambda: CriticSettings())

    @model_validator(mode="after")
    def _is_bounded(self) -> AdversarialSettings:
        penalised, clipped = self.gradient_penalty is not None, self.critic.weight_clip is not None
        if penalised and clipped:
            raise ValueError("set gradient_penalty or critic.weight_clip, not both")
        if self.real_penalty is not None and (penalised or clipped or self.assignment != "single"):
            raise ValueError(
                "real_penalty is of one critic: set assignment=single, and leave gradient_penalty and weight_clip out"
            )
        if self.loss == "wasserstein" and not (penalised or clipped):
            raise ValueError(
                "a wasserstein critic must be bounded: set gradient_penalty (10 in WGAN-GP) or critic.weight_clip "
                "(0.01 in WGAN)"
            )
        if self.temperature != 1 and self.assignment != "posterior":
            raise ValueError("temperature is of assignment=posterior: leave it out")
        if self.posterior_slope and self.assignment != "posterior":
            raise ValueError("posterior_slope is of assignment=posterior: leave it out")
        return self

    @property
    def needs_density(self) -> bool:
        """Whether the generator must have a likelihood."""
        return bool(self.likelihood_weight or self.assignment != "single")

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        """Refuses what cannot work; see `FamilySettings.check_training`."""
        check_shares(training, lanes, self.critic_steps, "adversarial")
        penalty = next((name for name in ("gradient_penalty", "real_penalty") if getattr(self, name) is not None), None)
        refuse_zero_3(
            training,
            f"{penalty}, which is differentiated twice: ZeRO-3 has let go of the weights by then"
            if penalty
            else "adversarial, in which each network is asked in the other's turn: ZeRO-3 then holds it in parts",
        )

    def objective(
        self,
        model: Any,
        manifest: Manifest,
        training: TrainingSettings,
        likelihood: MaximumLikelihood | None = None,
        pretrain_steps: int = 0,
    ) -> Objective:
        """The objective (see `trainer.objectives.adversarial.Adversarial`) of a generator, with a new critic.

        A density comes with its `likelihood`, whose player it is, and may first train by that alone.
        """
        from trainer.initialise import rows_for_scale
        from trainer.models.scaling import mean_and_deviation
        from trainer.objectives.adversarial import Adversarial
        from trainer.players import make_player

        generator = likelihood.players["model"] if likelihood else None
        critic = self.critic.player(model, manifest, training, 1 if self.assignment == "single" else model.n_components)
        if self.standardise and likelihood and manifest.levels is None:
            network: Any = critic.module
            rows = rows_for_scale(manifest, training, InitialisationSettings())
            network.set_scale(*mean_and_deviation(rows, len(network.offset)))
        return Adversarial(
            generator or make_player(model, training.optimiser, training.steps),
            critic,
            loss=self.loss,
            critic_steps=self.critic_steps,
            gradient_penalty=self.gradient_penalty,
            real_penalty=self.real_penalty,
            likelihood=likelihood,
            likelihood_weight=self.likelihood_weight,
            pretrain_steps=pretrain_steps,
            assignment=self.assignment,
            temperature=self.temperature,
            posterior_slope=self.posterior_slope,
        )


class TransportSettings(Settings):
    """Entropic optimal transport between mini-batches of samples and data, by Sinkhorn's iterations."""

    epsilon: float = Field(0.1, gt=0, description="entropic regularisation, as a share of the mean cost")
    iterations: int = Field(50, ge=1, description="Sinkhorn iterations, through all of which gradients flow")
    debiased: bool = Field(True, description="the Sinkhorn divergence; false: the plan's bare cost (Algorithm 4)")
    embedding: int | None = Field(
        None, ge=1, description="dimensions in which a critic learns the cost; null: squared distance of the samples"
    )
    critic_steps: int = Field(5, ge=1, description="with an embedding: its turns in a step, which share the batch")
    critic: CriticSettings = Field(default_factory=lambda: CriticSettings())

    @model_validator(mode="after")
    def _is_bounded(self) -> TransportSettings:
        if self.embedding is not None and self.critic.weight_clip is None:
            raise ValueError("an embedding without bound makes any cost: set critic.weight_clip (such as 0.1)")
        return self

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        """Refuses what cannot work; see `FamilySettings.check_training`."""
        check_shares(training, lanes, self.critic_steps if self.embedding else 1, "transport")
        if self.embedding:
            refuse_zero_3(training, "embedding, which is asked in the generator's turn: ZeRO-3 then holds it in parts")

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        """The objective of a generator (see `trainer.objectives.transport.Transport`)."""
        from trainer.objectives.transport import Transport
        from trainer.players import make_player

        critic = self.critic.player(model, manifest, training, self.embedding) if self.embedding else None
        return Transport(
            make_player(model, training.optimiser, training.steps),
            critic,
            epsilon=self.epsilon,
            iterations=self.iterations,
            debiased=self.debiased,
            critic_steps=self.critic_steps,
        )


def check_shares(training: TrainingSettings, lanes: int, turns: int, section: str) -> None:
    """Raises ValueError unless every lane's rows of a step divide among the critic's turns."""
    if training.batch_size % (lanes * turns):
        raise ValueError(
            f"training.batch_size ({training.batch_size}) is shared by {turns} turns of the critic "
            f"(model.{section}.critic_steps) and {lanes} lanes: make it a multiple of {lanes * turns}"
        )


def refuse_zero_3(training: TrainingSettings, what: str) -> None:
    """Raises ValueError, with the reason, where training is by DeepSpeed's ZeRO-3."""
    if training.engine == "deepspeed" and training.zero_stage == 3:
        raise ValueError(f"training.zero_stage=3 cannot train with {what}; set it to 2 or less")
