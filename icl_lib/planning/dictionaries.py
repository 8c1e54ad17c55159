"""The SAEs that a card names, as far as their names tell: where they read, how wide they are, what they cost."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.files.names import located
from icl_lib.models import ModelConfig, Site
from icl_lib.saes.cost import Dictionary
from icl_lib.saes.formats import gemma_scope, saex
from icl_lib.saes.formats.places import site_named
from icl_lib.saes.formats.suites import has_layer, layers_of, with_layer

_LATENTS = {"nev/gemma-2b-saex-test": 32768, "nev/phi-3-4k-saex-test": 98304}
# What `train_suite` makes at each layer, all in one folder whose name says nothing.
_OWN = (("resid_pre", "resid_pre"), ("attn_out", "attn_out"), ("mlp_in", "mlp_out"))


def sites_of(pattern: str, layer: int) -> list[tuple[Site, Site]]:
    """Where the SAEs sit, (input, output) of each, that this name stands for with that number in it.

    A name with `{layer}` in it stands for one, which the formats' own readers find; any other for a suite of our own,
    of three. Raises `ValueError` if the name does not say where its SAEs sit.
    """
    if not has_layer(pattern):
        return [(Site(a, layer), Site(b, layer)) for a, b in _OWN]
    name = with_layer(pattern, layer)
    if sites := saex.sites_in(Path(name)) or gemma_scope.sites_in(Path(name)):
        return [sites]
    found = next((site for part in reversed(Path(name).parts) if (site := site_named(part))), None)
    if found is None:
        raise ValueError(f"the name {pattern!r} does not say where its SAEs sit, so nothing can be counted for it")
    return [(found, found)]


def dictionaries(card: Mapping[str, Any], config: ModelConfig) -> list[Dictionary]:
    """The SAEs of a card, from their names, at the sites by which `load_suite` knows them."""
    found = []
    for pattern in card["saes"]:
        width = _latents(pattern, config)
        for layer in layers_of(pattern, card["sae_layers"]):
            for read, write in sites_of(pattern, layer):
                next_block = read.name == "resid_post" and read.layer + 1 < config.n_layers
                at = Site("resid_pre", read.layer + 1) if next_block else read
                found.append(Dictionary(at, config.width(read.name), config.width(write.name), width))
    return found


def _latents(pattern: str, config: ModelConfig) -> int:
    """Latents of the SAEs that a pattern names; of our own suites from their files, or else 16 times the width."""
    if scope := re.search(r"width_(\d+)(k|m)", pattern):
        thousands = int(scope[1]) * (1000 if scope[2] == "k" else 1_000_000)
        return 2 ** thousands.bit_length()  # 16k is 2^14, 65k 2^16, 1m 2^20
    if number := re.search(r"_(\d{4,})$", pattern):
        return int(number[1])
    if known := [width for repo, width in _LATENTS.items() if pattern.startswith(repo)]:
        return known[0]
    file = next(iter(sorted(located(pattern, "saes").glob("*/cfg.json"))), None)
    return 16 * config.d_model if file is None else int(json.loads(file.read_text())["d_sae"])
