"""What single latents respond to and act on: roles, text examples, and links from detectors to executors."""

from icl_lib.features.examples import Examples, token_windows, top_examples, window_text
from icl_lib.features.links import Links, detector_executor, display_strength, random_latents
from icl_lib.features.roles import RoleMass, activation_mass

__all__ = [
    "Examples", "Links", "RoleMass", "activation_mass", "detector_executor", "display_strength",
    "random_latents", "token_windows", "top_examples", "window_text",
]  # fmt: skip
