"""Suites: one SAE for each of many sites of a model, read from patterns, lists and folders, written as folders."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from icl_lib.files.names import named
from icl_lib.files.processes import to_host
from icl_lib.models import ModelConfig, Site
from icl_lib.models.sites import LAYER_SITES, as_layers, as_site
from icl_lib.saes.formats import layer_files, saelens, sparsify
from icl_lib.saes.formats.load import detect, fetch_suite, is_one, load_sae
from icl_lib.saes.formats.places import not_ours
from icl_lib.saes.sae import SAE

_LAYER = re.compile(r"\{layer(?::(\d+)-(\d+))?\}")
_DTYPES = ("float32", "float16", "bfloat16")
_DEEPEST = 5  # folders below a suite's: dictionaries/model/place/run/ae.pt


def load_suite(
    source: str | Path | Sequence[str | Path],
    config: ModelConfig | None = None,
    layers: Iterable[int] | int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    sites: Iterable[Site | str] | Site | str | None = None,
    mesh: Mesh | None = None,
) -> dict[Site, SAE]:  # fmt: skip
    """SAEs keyed by the site they encode, in the order of sites.

    `source` is the name of an embedded model, whose suite it stands for, a folder (relative to the repository's root),
    or `owner/repository/path` on the hub (all of whose SAEs are then downloaded, at `revision`), of which all SAEs in
    any format of `load_sae` are taken; or a name for `load_sae`, of a single SAE or with `{layer}` in it, such as
    "google/gemma-scope-2b-pt-res/layer_{layer}/width_16k/canonical"; or a list of these. `layers` are the numbers to
    put there (default: all of the model; of `{layer:0-16}` those from 0 to 16, where there is no SAE for the others)
    and in a folder the layers of the sites to keep. `sites` are the sites to keep, ["resid_pre.4"], or names for those
    of every layer, ["resid_pre"]; others are read and dropped one by one. With a mesh (that of the model: `mesh_of`)
    each device holds its part of the latents.

    With `config`, layers and widths are held to that model, and an SAE of the residual behind a block is keyed by the
    same tensor's other name, "resid_pre" of the next block, if there is one. Raises `FileNotFoundError` if there is no
    SAE, and `ValueError` if one does not fit the model or two encode the same site, besides what `load_sae` raises.
    """
    layers = None if layers is None else as_layers(layers)
    sites = [sites] if isinstance(sites, Site | str) else sites
    kept = None if sites is None else {site if site in LAYER_SITES else as_site(site) for site in sites}
    sources = [source] if isinstance(source, str | Path) else list(source)
    sources = [str(named(each, "saes") or each) for each in sources]
    suite: dict[Site, SAE] = {}
    for pattern, name in [(each, name) for each in sources for name in _names(each, config, layers, revision)]:
        sae = _renamed(load_sae(name, revision, variant), config)
        if layers is not None and not has_layer(pattern) and sae.site_in.layer not in layers:
            continue
        if kept is not None and not kept & {sae.site_in, sae.site_in.name}:
            continue
        if sae.site_in in suite:
            raise ValueError(f"{name} encodes {sae.site_in}, and so does another SAE of {source}: keep one per site")
        if config is not None:
            check_fit(sae, config, name)
        suite[sae.site_in] = sae if mesh is None else shard_sae(sae, mesh)
    if not suite:
        at = f" at {', '.join(sorted(map(str, kept)))}" if kept else ""
        raise FileNotFoundError(f"{source} has no SAE{at} in layers {layers}: leave layers out to see what it has")
    return dict(sorted(suite.items()))


def shard_sae(sae: SAE, mesh: Mesh) -> SAE:
    """The SAE with its latents spread over the mesh's `model` axis; whole on every device where they do not divide."""
    cut = "model" if sae.d_sae % mesh.shape["model"] == 0 else None
    places = {"W_enc": P(None, cut), "W_dec": P(cut), "b_dec": P(), "W_skip": P()}
    place = lambda path: NamedSharding(mesh, places.get(jax.tree_util.keystr(path, simple=True), P(cut)))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(leaf, place(path)), sae)


def save_sae(sae: SAE, folder: str | Path, dtype: str = "float32") -> Path:
    """Write an SAE so that `load_sae` and SAELens read it; the matrices in `dtype`, the vectors always in float32.

    SAELens has no batchtopk, which comes back as the jumprelu it is, and no gated transcoder: one is written as the
    `jumprelu_transcoder` it folds to. A topk transcoder, which SAELens lacks and which cannot be folded, is written as
    sparsify does. Files appear whole or not at all. Raises `ValueError` if `dtype` is not float32, float16 or bfloat16,
    or if a weight is not finite in it, and `OSError` if the disk is full. Of several processes all have to call it.
    """
    whole = lambda leaf: leaf if leaf.is_fully_addressable else jnp.asarray(to_host(leaf))
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    write = sparsify.write if sae.is_transcoder and sae.architecture == "topk" else saelens.write
    return write(jax.tree.map(whole, sae), folder, dtype)


def save_suite(suite: Mapping[Site | str, SAE], folder: str | Path, dtype: str = "float32") -> Path:
    """Write each SAE of a suite to `folder/<site>.<layer>`; see `save_sae`."""
    for site, sae in ((as_site(site), sae) for site, sae in suite.items()):
        save_sae(sae, Path(folder) / (site.name if site.layer is None else f"{site.name}.{site.layer}"), dtype)
    return Path(folder)


def check_fit(sae: SAE, config: ModelConfig, name: str) -> None:
    """Raises `ValueError` naming the SAE, its site and both sizes if it does not fit the model, or if it was trained
    at a module that in this family returns another tensor than our site (`places.not_ours`)."""
    for what, size, site in (("d_in", sae.d_in, sae.site_in), ("d_out", sae.d_out, sae.site_out)):
        if site.layer is not None:
            config.check_layer(site.layer, f"layer of the SAE {name} at {site}")
        if size != config.width(site.name):
            there = f"there the model (d_model = {config.d_model}) is {config.width(site.name)} wide"
            other = "it was trained on another model; pass the suite of this one or train one with train_suite"
            raise ValueError(f"the SAE {name} at {site} has {what} = {size}, but {there}: {other}")
    if reason := not_ours(dict(sae.metadata), (sae.site_in, sae.site_out), config):
        raise ValueError(f"the SAE {name} at {sae.site_in} does not fit this model: {reason}")


def has_layer(pattern: str) -> bool:
    """Whether a name stands for many, by `{layer}` or `{layer:0-16}` in it. Raises `ValueError` on any other form."""
    match = _LAYER.search(pattern)
    if "{layer" in pattern and (match is None or (match[1] and int(match[1]) > int(match[2]))):
        raise ValueError(f"{pattern!r}: layers are written {{layer}}, or {{layer:0-16}} where only 0 to 16 have an SAE")
    return match is not None


def layers_of(pattern: str, layers: Iterable[int]) -> list[int]:
    """Those of `layers` that a name with `{layer:first-last}` allows; all without such a range."""
    match = _LAYER.search(pattern)
    return [layer for layer in layers if not (match and match[1]) or int(match[1]) <= layer <= int(match[2])]


def with_layer(pattern: str, layer: int | str) -> str:
    """The name for one layer: the number in the place of `{layer}` or `{layer:0-16}`."""
    return _LAYER.sub(str(layer), pattern)


def _names(source: str, config: ModelConfig | None, layers: tuple[int, ...] | None, revision: str | None) -> list[str]:
    """Names for `load_sae` of what one source stands for."""
    if has_layer(source):
        if layers is None and config is None:
            raise ValueError(f"{source!r} has a {{layer}} in it: say which with layers=[...], or pass the config")
        every = range(config.n_layers) if layers is None else layers
        return [with_layer(source, layer) for layer in layers_of(source, every)]
    if is_one(source) and not Path(source).is_dir():
        return [source]
    folder = fetch_suite(source, revision)
    if detect(folder):
        return [str(folder)]
    inside = sorted(path for path in folder.rglob("*") if len(path.relative_to(folder).parts) <= _DEEPEST)
    inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]  # not ours
    found = [path for path in inside if (path.is_dir() and detect(path)) or layer_files.NAME.fullmatch(path.name)]
    if not found:
        raise FileNotFoundError(f"{folder} has no sub-folder with files of an SAE: a suite is what save_suite writes")
    return [str(path) for path in found]


def _renamed(sae: SAE, config: ModelConfig | None) -> SAE:
    """At "resid_pre" of the next block, if it reads "resid_post" of a block that has a next."""
    site = sae.site_in
    if config is None or site.name != "resid_post" or site.layer + 1 >= config.n_layers or sae.is_transcoder:
        return sae
    renamed = Site("resid_pre", site.layer + 1)
    return dataclasses.replace(sae, site_in=renamed, site_out=renamed)


def sae_at(suite: Mapping[Site, SAE], site: Site) -> SAE:
    """The suite's SAE at a site. Raises `ValueError` that names those there are."""
    if site not in suite:
        raise ValueError(
            f"there is no SAE at {site}, the suite has {', '.join(map(str, suite)) or 'none'}: add the layer to "
            "sae_layers, or choose another one"
        )
    return suite[site]
