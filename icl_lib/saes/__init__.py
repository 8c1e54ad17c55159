"""Sparse autoencoders and transcoders: the module, its files, its objective, its training and its quality."""

from icl_lib.saes.activations import harvest, needed_sites, output_site, suite_sites, token_mask
from icl_lib.saes.formats import check_fit, load_sae, load_suite, save_sae, save_suite
from icl_lib.saes.metrics import ce_recovered, quality_table
from icl_lib.saes.sae import SAE, jumprelu
from icl_lib.saes.training import Progress, TrainingError, train_suite

__all__ = [
    "SAE", "Progress", "TrainingError", "ce_recovered", "check_fit", "harvest", "jumprelu", "load_sae", "load_suite",
    "needed_sites", "output_site", "quality_table", "save_sae", "save_suite", "suite_sites", "token_mask", "train_suite",
]  # fmt: skip
