"""Small models and objectives of responsibility learning."""

from torch import nn

from trainer.models.gan import Critic
from trainer.models.responsibility import ResponsibilityGAN
from trainer.objectives.responsibility import (
    Decoder,
    ResponsibilityLearning,
)
from trainer.players import make_player
from trainer.settings import OptimiserSettings

LETTER = {}
WORKING = {
    "loss": "non-saturating",
    "pairs": "augmented",
    "uniform_share": 0.1,
    "classifier_adversarial": False,
    "label_steps": 3,
    "classifier_consistency": 0.3,
    "generator_consistency": 0.5,
    "real_penalty": 0.7,
}


def model_for(shape=(8, 8), k=3, *, shared=False, prior="learnt", n_latent=4):
    return ResponsibilityGAN(
        shape,
        k,
        n_latent=n_latent,
        n_hidden=9,
        width=4,
        bounded=len(shape) > 1,
        prior=prior,
        encoder_hidden=6,
        encoder_width=4,
        shared=shared,
    )


def objective_for(model, kind=ResponsibilityLearning, optimiser=None, steps=10, heads=1, **options):
    optimiser = optimiser or OptimiserSettings(name="sgd", learning_rate=0.1, beta1=0.0)
    discriminator = (
        nn.Linear(model.encoder.n_outputs, heads) if model.shared else Critic(model.shape, heads, 6, 1, 1, 4)
    )
    modules = {
        "model": Decoder(model.generator),
        "prior": model.prior,
        "classifier": model.classifier,
        "discriminator": discriminator,
        **({"encoder": model.encoder} if model.shared else {}),
    }
    return kind({name: make_player(module, optimiser, steps) for name, module in modules.items()}, **options)
