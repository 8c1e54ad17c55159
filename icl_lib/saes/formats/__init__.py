"""SAE files of every public library: read by `load_sae` and `load_suite`, written in SAELens' layout by `save_*`.

One module a format; where it has a writer, that is for round trips and for stand-ins of published suites.
"""

from icl_lib.saes.formats.load import detect, load_sae
from icl_lib.saes.formats.suites import check_fit, load_suite, sae_at, save_sae, save_suite

__all__ = ["check_fit", "detect", "load_sae", "load_suite", "sae_at", "save_sae", "save_suite"]
