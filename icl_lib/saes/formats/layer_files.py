"""Per-layer transcoders as circuit-tracer reads them: one file `layer_3.safetensors` for each MLP, e.g. mwhanna's for Qwen3.

A ReLU transcoder from what the MLP reads to what it adds, the encoder stored as (d_sae, d_in). A `W_skip` may be there.
Source: the loader of sae-lens 6.54, with which tests/golden compares.
"""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from icl_lib.files.write import replace_file
from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.common import Sites
from icl_lib.saes.sae import SAE

NAME = re.compile(r"layer_(\d+)\.safetensors")
PATTERNS = tuple(f"layer_{'[0-9]' * digits}.safetensors" for digits in (1, 2, 3))  # the same, as the hub takes it
_SPEC = {"W_enc": "W_enc F d", "b_enc": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o"}
_SKIP = {"W_skip": "W_skip o d"}


def read(path: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The transcoder in one file; see `load_sae`."""
    found = common.read_safetensors(path)
    w = common.take(found, _SPEC | (_SKIP if "W_skip" in found else {}), path)
    layer = int(NAME.fullmatch(path.name)[1])
    return common.build(w, site or (Site("mlp_in", layer), Site("mlp_out", layer)), "standard", path)


def write(sae: SAE, folder: str | Path) -> Path:
    """Write a ReLU transcoder to `folder/layer_N.safetensors`. Returns the file."""
    if sae.architecture != "standard" or not sae.is_transcoder:
        raise ValueError(f"these files are for standard transcoders, got a {sae.architecture} one at {sae.site_in}")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {} if sae.W_skip is None else {"W_skip": sae.W_skip.T}
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    path = Path(folder) / f"layer_{sae.site_in.layer}.safetensors"
    replace_file(path, lambda partial: save_file(tensors, partial))
    return path
