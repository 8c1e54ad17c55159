"""The SAEs that a card names, as far as their names tell: where they read, how wide they are, what they hold and cost."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.files.paths import resolve
from icl_lib.models import ModelConfig
from icl_lib.saes.formats.suites import has_layer, layers_of

_LATENTS = {"nev/gemma-2b-saex-test": 32768, "nev/phi-3-4k-saex-test": 98304}


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """One SAE that a card names: where it reads, and its widths."""

    kind: str  # resid, attn, mlp or transcoder
    layer: int
    d_in: int
    d_out: int
    d_sae: int

    @property
    def bytes(self) -> int:
        """In float32, the form in which SAEs are computed with."""
        return 4 * (self.d_sae * (self.d_in + self.d_out + 3) + self.d_out)

    @property
    def encode_flops(self) -> int:
        """Of one token's latents."""
        return 2 * self.d_sae * self.d_in

    @property
    def decode_flops(self) -> int:
        """Of one token's reconstruction, and of the gradient by its latents."""
        return 2 * self.d_sae * self.d_out

    @property
    def flops(self) -> int:
        """Of encoding and decoding one token."""
        return self.encode_flops + self.decode_flops


def dictionaries(card: Mapping[str, Any], config: ModelConfig) -> list[Dictionary]:
    """The SAEs of a card, from their names (or, for a suite of our own, from its files; 16 times the width where there are none)."""
    found = []
    for pattern in card["saes"]:
        width = _latents(pattern, config)
        for kind in _kinds(pattern):
            d_in = config.width("z") if kind == "attn" and "gemma-scope" in pattern else config.d_model
            d_out = d_in if kind == "attn" else config.d_model
            found += [Dictionary(kind, layer, d_in, d_out, width) for layer in layers_of(pattern, card["sae_layers"])]
    return found


def _kinds(pattern: str) -> list[str]:
    if not has_layer(pattern):  # a suite in one folder: what train_suite makes
        return ["resid", "attn", "transcoder"]
    for kind, words in (("transcoder", ("transcoder",)), ("attn", ("att",)), ("mlp", ("mlp",)), ("resid", ())):
        if not words or any(word in pattern for word in words):
            return [kind]
    return []


def _latents(pattern: str, config: ModelConfig) -> int:
    """Latents of the SAEs that a pattern names."""
    if scope := re.search(r"width_(\d+)(k|m)", pattern):
        return (
            2 ** (int(scope[1]) * (1000 if scope[2] == "k" else 1_000_000)).bit_length()
        )  # 16k is 2^14, 65k 2^16, 1m 2^20
    if number := re.search(r"_(\d{4,})$", pattern):
        return int(number[1])
    for repo, width in _LATENTS.items():
        if pattern.startswith(repo):
            return width
    for file in sorted(Path(resolve(pattern)).glob("*/cfg.json")):
        if text := re.search(r'"d_sae": (\d+)', file.read_text()):
            return int(text[1])
    return 16 * config.d_model
