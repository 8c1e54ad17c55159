"""What single latents respond to and act on: steering one by one, roles, text examples, links from detectors to executors."""

from icl_lib.features.examples import Examples, top_examples, window_text
from icl_lib.features.links import Links, detector_executor, display_strength, mean_strength
from icl_lib.features.roles import RoleMass, activation_mass
from icl_lib.features.steer import (
    LengthSweep,
    active_latents,
    best_lengths,
    latent_decrease,
    length_sweep,
    loss_decrease,
    random_latents,
    serves_one,
    stands_out,
)

__all__ = [
    "Examples", "LengthSweep", "Links", "RoleMass", "activation_mass", "active_latents", "best_lengths",
    "detector_executor", "display_strength", "latent_decrease", "length_sweep", "loss_decrease", "mean_strength", "random_latents",
    "serves_one", "stands_out", "top_examples", "window_text",
]  # fmt: skip
