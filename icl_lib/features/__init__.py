"""What single latents respond to and act on: steering one by one, roles, text examples, links from detectors to
executors.
"""

from icl_lib.features.examples import Examples, top_examples
from icl_lib.features.links import Links, detector_executor, display_strength, mean_strength
from icl_lib.features.mass import Mass, activation_mass
from icl_lib.features.names import latent_names
from icl_lib.features.nulls import BestOfNull, against_sets, best_of, discoveries, matched_sets, mean_activity, p_values
from icl_lib.features.steer import (
    LengthSweep,
    active_latents,
    best_lengths,
    first_candidates,
    latent_decrease,
    length_sweep,
    loss_decrease,
    percentile_of,
    random_latents,
    serves_one,
    stands_out,
)

__all__ = [
    "BestOfNull", "Examples", "LengthSweep", "Links", "Mass", "activation_mass", "active_latents", "against_sets",
    "best_lengths", "best_of", "detector_executor", "discoveries", "display_strength", "first_candidates",
    "latent_decrease", "latent_names", "length_sweep", "loss_decrease", "matched_sets", "mean_activity",
    "mean_strength", "p_values", "percentile_of", "random_latents", "serves_one", "stands_out", "top_examples",
]  # fmt: skip
