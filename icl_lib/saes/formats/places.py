"""Where the SAE of a file sits: the names other libraries give to places, and the families in which these are sites.

A *hook* is TransformerLens' name of a tensor. Those that we read are the same tensors in every family of ours:
`hook_attn_out` and `hook_mlp_out` lie behind the second norms of Gemma 2, `ln2.hook_normalized` before the norm's gain,
`hook_z` is read head by head, `hook_embed` is what enters the first block, and `hook_resid_mid`, which TransformerLens
does not have in the parallel blocks of GPT-NeoX, is ours alone there. `ln_final.hook_normalized` is another tensor: it
lies before the gain of the last norm, our site behind it; our writers call that `final_norm` (`name_of`). Two ways of
loading a model into TransformerLens move its tensors (`_moved`).

A *module* stands for what it returns (`layers.3.mlp`, also written `mlp_out_layer3`), which is our site in some
families only. An SAE that was named so keeps the name in its metadata, as `module`, and `not_ours` holds it to the
model's family.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.models import ModelConfig, Site, tiny_config

Sites = tuple[Site, Site]  # what is encoded, what is reconstructed
_BLOCK = r"(?:(?P<root>model|gpt_neox)\.)?layers[._](?P<layer>\d+)"
_MODULES = (
    (r"resid_(?:post|out)_?layer_?(?P<layer>\d+)", "resid_post"),
    (r"resid_(?:pre|in)_?layer_?(?P<layer>\d+)", "resid_pre"),
    (r"(?:attn|attention)_out_?layer_?(?P<layer>\d+)", "attn_out"),
    (r"mlp_out_?layer_?(?P<layer>\d+)", "mlp_out"),
    (_BLOCK, "resid_post"),
    (_BLOCK + r"\.(?P<child>self_attn|attention)", "attn_out"),
    (_BLOCK + r"\.(?P<child>mlp)", "mlp_out"),
    (r"embed", "embed"),
    (r"(?:(?P<root>gpt_neox)\.)?(?P<child>embed_in)", "embed"),
    (r"(?:(?P<root>model)\.)?(?P<child>embed_tokens)", "embed"),
    (r"(?P<root>model)\.norm|(?P<neox>gpt_neox)\.final_layer_norm", "final_norm"),
)
# Which names are those of GPT-NeoX; the families besides it share theirs.
_NEOX = dict.fromkeys(("gpt_neox", "attention", "embed_in"), True)
_NEOX |= dict.fromkeys(("model", "self_attn", "embed_tokens"), False)
# The family that a model's name tells; "gemma-2b" is of the first Gemma.
_FAMILIES = {
    r"gemma-?[23](?!b)": "gemma2", r"gemma": "gemma", r"pythia|neox": "gpt_neox", r"qwen": "qwen2",
    r"llama|phi-?3": "llama",
}  # fmt: skip
_MOVERS = ("center_writing_weights", "fold_value_biases")
_IN = ("feature_input_hook", "hook_name", "hook_point", "hook_point_in", "site_in")
_OUT = ("feature_output_hook", "hook_name_out", "hook_point_out", "site_out")


def name_of(site: Site) -> str:
    """The name that our writers give a site, TransformerLens' where it has one; `locate` reads it back."""
    return site.name if site == Site("final_norm") else str(site)


def site_named(module: str) -> Site | None:
    """The site that a module or folder is named after, e.g. "resid_out_layer3" or "layers.3.mlp"; None for others."""
    match, name = _parse(module)
    return match and Site(name, int(match["layer"]) if "layer" in match.re.groupindex else None)


def _parse(module: str) -> tuple[re.Match | None, str]:
    found = ((re.fullmatch(pattern, module), name) for pattern, name in _MODULES)
    return next(((match, name) for match, name in found if match), (None, ""))


def locate(name: Any, path: Path, layer: int | None = None) -> tuple[Site, str]:
    """The site of a hook or module, and the module's name ("" for a hook); `layer` is the number of a hook without one.
    Raises `ValueError` naming the file if we have no such site."""
    text = str(name)
    if text == "final_norm":
        return Site(text), ""
    if layer is not None and not text.startswith("blocks."):
        text = f"blocks.{layer}.{text}"
    if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_out", text):  # what the MLP returns
        text = f"layers.{match[1]}.mlp"
    if site := site_named(text):
        return site, text
    try:
        site = Site.parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: its hook must name a site of ours ({error}); pass site= to say which") from error
    if site == Site("final_norm"):
        raise ValueError(f"{path}: {name} lies before the gain of the last norm, and our site final_norm behind it")
    return site, ""


def located(cfg: Mapping[str, Any], path: Path, layer: int | None = None) -> tuple[Sites | None, str]:
    """The sites that a config names, None if it names none, and the modules among the names; see `locate`."""
    first, last = (next((cfg[key] for key in keys if cfg.get(key)), None) for keys in (_IN, _OUT))
    if first is None and last is None:
        return None, ""
    if first is None:
        raise ValueError(f"{path} names what its features write, {last}, but not what they read: pass site=(in, out)")
    (site_in, module_in), (site_out, module_out) = (locate(name, path, layer) for name in (first, last or first))
    return (site_in, site_out), " ".join(dict.fromkeys(filter(None, (module_in, module_out))))


def settle(
    site: Sites | None, cfg: Mapping[str, Any], path: Path, elsewhere: Sites | None = None, layer: int | None = None
) -> tuple[Sites, str]:
    """The sites of an SAE and the modules among their names: `site`, which the caller gave, or what the config names
    (see `locate`), or what is known from `elsewhere`. Raises `ValueError` naming the file if there is none of these."""
    sites, module = (site, "") if site else located(cfg, path, layer)
    if sites is None and elsewhere is None:
        raise no_site(path)
    return sites or elsewhere, module


def not_ours(meta: Mapping[str, Any], sites: Sites, config: ModelConfig) -> str | None:
    """Why the tensor that an SAE's metadata names is not our site in a model of this family; None if it is."""
    for module in str(meta.get("module", "")).split():
        match, name = _parse(module)
        parts = [] if match is None else [part for part in match.groupdict().values() if part in _NEOX]
        if any(_NEOX[part] != (config.family == "gpt_neox") for part in parts):
            return f"{module} is no module of the family {config.family}: it was trained on another model"
        if name in ("attn_out", "mlp_out") and config.post_norms:
            return f"{module} returns what lies before a second norm in {config.family}, and our {name} lies behind it"
        if name == "embed" and config.scale_embed:
            return f"{module} returns rows of the embedding, and embed of {config.family} is these times sqrt(d_model)"
    return _moved(meta, sites, config)


def _moved(meta: Mapping[str, Any], sites: Sites, config: ModelConfig) -> str | None:
    """Centred weights take the mean from the residual where norms do too; folded value biases leave z without them."""
    writes = {"embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"} & {site.name for site in sites}
    if meta.get(_MOVERS[0]) and config.norm == "layer" and writes:
        return f"it was trained on weights with {_MOVERS[0]}, which take the mean from {min(writes)} of {config.family}"
    if meta.get(_MOVERS[1]) and config.qkv_bias and "z" in {site.name for site in sites}:
        return f"it was trained on weights with {_MOVERS[1]}, which leave z of {config.family} without the value's bias"
    return None


def movers(kwargs: Any) -> dict[str, bool]:
    """What of the arguments with which TransformerLens loaded the model moves tensors: `not_ours` needs it."""
    return {key: True for key in _MOVERS if isinstance(kwargs, dict) and kwargs.get(key)}


def check_named(meta: Mapping[str, Any], sites: Sites, path: Path) -> None:
    """Raises `ValueError` if the named tensor is not our site in the family of the model that the metadata name."""
    model = str(meta.get("model_name", ""))
    family = next((family for pattern, family in _FAMILIES.items() if re.search(pattern, model.lower())), None)
    if family and (reason := not_ours(meta, sites, tiny_config(family))):
        raise ValueError(f"{path} (of {model}): {reason}; pass site= if another site is meant")


def no_site(path: Path) -> ValueError:
    """The error of a file that does not say where its SAE sits."""
    example = 'site=Site("resid_post", 3)'
    return ValueError(f"{path}: neither its settings nor its folder say where the SAE sits: pass {example} or the like")
