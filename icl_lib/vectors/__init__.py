"""Task vectors: extracted from prompts, decomposed over a dictionary, cleaned by gradient descent, and inserted."""

from icl_lib.vectors.cleaning import Cleaned, clean, select_l1
from icl_lib.vectors.insert import (
    Cut,
    base_nll,
    cut,
    inserted_nll,
    inserted_nll_by_layer,
    latent_directions,
    relative_change,
)
from icl_lib.vectors.pursuit import gradient_pursuit, pursuit_path
from icl_lib.vectors.steering import negative_steering, steer
from icl_lib.vectors.task_vectors import output_vector, subtract_corrupted, task_vector

__all__ = [
    "Cleaned", "Cut", "base_nll", "clean", "cut", "gradient_pursuit", "inserted_nll", "inserted_nll_by_layer",
    "latent_directions", "negative_steering", "output_vector", "pursuit_path", "relative_change",
    "select_l1", "steer", "subtract_corrupted", "task_vector",
]  # fmt: skip
