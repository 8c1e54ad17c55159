"""Sparse autoencoders and transcoders: the module, its files and its quality. `icl_lib.training` trains them."""

from icl_lib.saes.activations import harvest, needed_sites, output_site, suite_sites
from icl_lib.saes.formats import check_fit, load_sae, load_suite, sae_at, save_sae, save_suite
from icl_lib.saes.quality import ce_recovered, quality_table
from icl_lib.saes.sae import SAE, jumprelu

__all__ = [
    "SAE", "ce_recovered", "check_fit", "harvest", "jumprelu", "load_sae", "load_suite", "needed_sites", "output_site",
    "quality_table", "sae_at", "save_sae", "save_suite", "suite_sites",
]  # fmt: skip
