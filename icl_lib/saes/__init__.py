"""Sparse autoencoders and transcoders: the module, its files, its objective, its training and its quality."""

from icl_lib.saes.activations import harvest, needed_sites, output_site, suite_sites, token_mask
from icl_lib.saes.arrays import Progress, train_on
from icl_lib.saes.corpus import TextCorpus, open_text
from icl_lib.saes.formats import check_fit, load_sae, load_suite, save_sae, save_suite
from icl_lib.saes.jobs import train_suite
from icl_lib.saes.metrics import ce_recovered, quality_table
from icl_lib.saes.recipes import Recipe, TrainingError, make_recipe
from icl_lib.saes.sae import SAE, jumprelu
from icl_lib.saes.suite import Member

__all__ = [
    "SAE", "Member", "Progress", "Recipe", "TextCorpus", "TrainingError", "ce_recovered", "check_fit", "harvest", "jumprelu", "load_sae",
    "load_suite", "make_recipe", "needed_sites", "open_text", "output_site", "quality_table", "save_sae", "save_suite", "suite_sites",
    "token_mask", "train_on", "train_suite",
]  # fmt: skip
