r"""Gemma Scope: `layer_20/width_16k/average_l0_71/params.npz` in one repository per model and kind of site.

JumpReLU, $f = p\,1[p > \theta]$ with $p = x W_{enc} + b_{enc}$, for activations as they are. Which site an SAE sits at
is known from the repository: `res` after block L, `att` at the heads' outputs before the output matrix, `mlp` and
`transcoders` behind the MLP's second norm; transcoders read the MLP's norm before its gain. Embedding SAEs were trained
on rows of the embedding; our site "embed" is these times $\sqrt d$, which is folded in.

`gemma_scope.tsv` lists what the hub has. An id ends with `average_l0_71` or with `canonical`, which is the one that
SAELens gives this name to, or else (a width without one) the one closest to 100; for SAELens' own that is the same
rule. Sources: Lieberum et al. (2024), "Gemma Scope"; the cards of the repositories; the registry of SAELens
(2025-10-22).
"""

import csv
import functools
import math
import re
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np

from icl_lib.files.write import replace_file
from icl_lib.models import Site
from icl_lib.saes.formats import common
from icl_lib.saes.formats.places import Sites, settle
from icl_lib.saes.sae import SAE

WEIGHTS = "params.npz"
FILES = (WEIGHTS,)
_SPEC = {"W_enc": "W_enc d F", "b_enc": "b_enc F", "W_dec": "W_dec F o", "b_dec": "b_dec o", "threshold": "threshold F"}
_KINDS = {
    "res": ("resid_post", "resid_post"), "att": ("z", "z"), "mlp": ("mlp_out", "mlp_out"),
    "transcoders": ("mlp_normalized", "mlp_out"),
}  # fmt: skip
_RELEASE = re.compile(r"(gemma-scope-\w+-\w+-(res|att|mlp|transcoders))(?:-canonical)?/")
_ID = re.compile(rf"(?:google/)?{_RELEASE.pattern}(.+)")  # SAELens: release/id
_PLACE = re.compile(r"(?:layer_(\d+)|(embedding))/width_(\w+)/(canonical|average_l0_\d+)")


@functools.cache
def table() -> dict[tuple[str, str, str], tuple[str, tuple[int, ...]]]:
    """By release, layer (or "embedding") and width: the canonical L0 ("" if there is none) and all that the hub has."""
    with resources.files("icl_lib.saes.formats").joinpath("gemma_scope.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {
            (r["release"], r["layer"], r["width"]): (r["canonical"], tuple(int(n) for n in r["average_l0"].split()))
            for r in rows
        }


def resolve(name: str) -> str:
    """`name` with `canonical` as its last part replaced by `average_l0_N`; other names as they are. Raises `ValueError`
    if there is no canonical SAE of that name, with what there is instead."""
    if not name.rstrip("/").endswith("/canonical"):
        return name
    release, place = _RELEASE.search(name), _PLACE.search(name)
    if not release or not place:
        example = "google/gemma-scope-2b-pt-res/layer_12/width_16k/canonical"
        raise ValueError(f"{name!r}: only SAEs of Gemma Scope have canonical in their name, as in {example}")
    layer = place[1] or place[2]
    if (release[1], layer, place[3]) not in table():
        widths = [width for r, number, width in table() if (r, number) == (release[1], layer)]
        has = f"layer {layer} has width {', '.join(widths)}" if widths else "there are " + _layers(release[1])
        raise ValueError(f"{name!r} is not in Gemma Scope: {has}")
    canonical, l0s = table()[release[1], layer, place[3]]
    best = canonical or min(l0s, key=lambda n: abs(n - 100))
    return name[: place.start(4)] + f"average_l0_{best}"


def on_hub(name: str) -> str:
    """Owner, repository and folder for SAELens' release and id, such as "gemma-scope-2b-pt-res-canonical/layer_20"."""
    match = _ID.fullmatch(name)
    return f"google/{match[1]}/{match[3]}" if match else name


def refuse_all(name: str) -> None:
    """Raises `ValueError` if `name` is a part of Gemma Scope with several SAEs at a site: hundreds of gigabytes."""
    if _RELEASE.search(f"{name}/") and not _PLACE.search(name):
        example = "google/gemma-scope-2b-pt-res/layer_{layer}/width_16k/canonical"
        raise ValueError(f"no folder {name!r} here, and in Gemma Scope it holds many SAEs for each site: try {example}")


def others(name: str) -> str:
    """The end of a sentence: what else Gemma Scope has for the layer and width in `name`, if that is one of its."""
    release, place = _RELEASE.search(name), _PLACE.search(name)
    entry = table().get((release[1], place[1] or place[2], place[3])) if release and place else None
    return f" (of this width, average_l0 {', '.join(map(str, entry[1]))})" if entry else ""


def read(path: Path, site: Sites | None = None, variant: str | None = None) -> SAE:
    """The SAE in a folder with `params.npz`; see `load_sae`."""
    file = path / WEIGHTS if path.is_dir() else path
    cfg, beside = common.read_beside(file.parent)
    common.check_settings(cfg, beside, "jumprelu", architecture=(None, "jumprelu", "jumprelu_transcoder"))
    cfg = cfg | (cfg.get("metadata") or {})
    sites, module = settle(site, cfg, beside, sites_in(file))
    w = common.take(_read_npz(file), _SPEC, file)
    if sites[0] == Site("embed"):
        root = math.sqrt(w["W_enc"].shape[0])
        w = common.fold_scales(w, 1 / root, root)
    place = _PLACE.search(file.absolute().as_posix())
    meta = ({"folder": place[0]} if place else {}) | {key: cfg[key] for key in ("model_name",) if key in cfg}
    return common.build(w, sites, "jumprelu", file, meta, module=module)


def write(sae: SAE, folder: str | Path) -> Path:
    """Write an SAE that folds as Gemma Scope does, into a folder named as theirs, which says where the SAE sits."""
    folder, sae = Path(folder), sae.fold()
    w = common.arrays(sae)
    if sae.W_skip is not None:
        raise ValueError(f"Gemma Scope has no skip matrices, but the transcoder at {sae.site_in} has one")
    if sae.site_in == Site("embed"):
        root = math.sqrt(sae.d_in)
        w = common.fold_scales(w, root, 1 / root)
    replace_file(folder / WEIGHTS, lambda partial: np.savez(partial, **w))
    return folder


def _layers(release: str) -> str:
    layers = sorted({int(layer) for r, layer, _ in table() if r == release and layer != "embedding"})
    return f"layers {layers}" if layers else "releases " + ", ".join(sorted({r for r, _, _ in table()}))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays by the names of our spec; some files spell w_enc, some have a scaling_factor of ones."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:  # of a bad file, numpy closes none
            found = {re.sub("^w_", "W_", name): npz[name].astype(np.float32, copy=False) for name in npz.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as npz ({error}): is it cut short? Download it again") from error
    common.drop_ones(found, path)
    return found


def sites_in(path: Path) -> Sites | None:
    """The sites that the path of a file or folder tells, None if it is none of Gemma Scope's."""
    where = path.absolute().as_posix()
    release, place = _RELEASE.search(where), _PLACE.search(where)
    if place and place[2]:
        return Site("embed"), Site("embed")
    return tuple(Site(name, int(place[1])) for name in _KINDS[release[2]]) if release and place else None
