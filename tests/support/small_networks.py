"""A small one of each network, by its name in checkpoints."""

from inr_kernels.models import (
    DEAR,
    IN2,
    LIIF,
    LTE,
    DEARConfig,
    ImplicitAutoencoder,
    IN2Config,
    LaMa,
    LaMaConfig,
    LIIFConfig,
    LTEConfig,
)

NETWORKS = {
    "DEAR": lambda: DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))),
    "IN2": lambda: IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8))),
    "ImplicitAutoencoder": lambda: ImplicitAutoencoder(latent="local", channels=4, hidden=(8, 8)),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1, activation="tanh")),
    "LIIF": lambda: LIIF(LIIFConfig(blocks=1, features=4, hidden=(8, 8))),
    "LTE": lambda: LTE(LTEConfig(blocks=1, features=4, hidden=(8, 8), hidden_dim=8)),
}
