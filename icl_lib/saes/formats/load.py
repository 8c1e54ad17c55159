"""From the name of an SAE to the SAE: where its files are, which format they have, and the reader of that format."""

import json
from collections.abc import Callable
from pathlib import Path

from icl_lib.files.hub import fetch_folder, nothing_at
from icl_lib.files.names import located
from icl_lib.files.paths import resolve
from icl_lib.models import Site
from icl_lib.models.sites import as_site
from icl_lib.saes.formats import (
    common,
    dictionary_learning,
    gemma_scope,
    layer_files,
    llama_scope,
    saelens,
    saex,
    sparsify,
)
from icl_lib.saes.sae import SAE

_READERS: dict[str, Callable[..., SAE]] = {
    module.__name__.rpartition(".")[2]: module.read
    for module in (saelens, saex, gemma_scope, dictionary_learning, sparsify, llama_scope, layer_files)
}
_VARIANTS = {"saex": ("paper",), "dictionary_learning": ("threshold",)}
# The file that gives a folder's format away, in the order in which we look.
_MARKS = {
    gemma_scope.WEIGHTS: "gemma_scope", llama_scope.CONFIG: "llama_scope", sparsify.WEIGHTS: "sparsify",
    dictionary_learning.WEIGHTS: "dictionary_learning",
}  # fmt: skip
_FOLDERS = (saelens, gemma_scope, llama_scope, sparsify, dictionary_learning)
_FILES = list(dict.fromkeys(file for module in _FOLDERS for file in module.FILES))
_SUFFIXES = (".safetensors", ".npz", ".pt")
_INSIDE = list(dict.fromkeys([*_FILES, *common.BESIDE, *layer_files.PATTERNS]))
_ANYWHERE = [*_INSIDE, *(f"*/{file}" for file in _INSIDE)]


def load_sae(
    name: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    site: Site | str | tuple[Site | str, Site | str] | None = None,
) -> SAE:
    """The SAE or transcoder in a folder, or in `owner/repository/path` on the hub at `revision`, in float32.

    Formats, told by the files: SAELens (version 6, and flat before it), Gemma Scope (`canonical` may end the name),
    dictionary_learning, sparsify, saex, Llama Scope, per-layer transcoders (name the file `layer_3.safetensors`). A `*`
    in the last part stands for what is not known, such as a coefficient; the first match in sorted order is taken. What
    the original does to its input and output is folded into the weights, so that the SAE takes plain activations of its
    site; what differs from token to token (SAELens' layer_norm, constant_norm_rescale) is refused: no weights do it.

    `site` says where the SAE sits, for files that do not, or in place of what they say; (input, output) for a
    transcoder. `variant="paper"` reads saex in the form of the ICL-SFC experiments instead of the trained one;
    `variant="threshold"` reads a TopK SAE of dictionary_learning with its recorded threshold.

    Raises `FileNotFoundError` if files are missing, and `ValueError` on an architecture, activation or normalisation
    that we cannot express, on missing, unknown or misshapen tensors, on values that are not finite, on files cut short,
    and on pickles with anything but tensors in them.
    """
    both = (site, site) if isinstance(site, Site | str) else site
    sites = None if both is None else tuple(map(as_site, both))
    path = _locate(str(name), revision)
    kind = detect(path)
    if kind is None:
        raise FileNotFoundError(f"{path} holds no SAE that we can read: expected one of {', '.join(_FILES)}")
    if variant is not None and variant not in _VARIANTS.get(kind, ()):
        has = ", ".join(f"{v!r} of {k}" for k, names in _VARIANTS.items() for v in names)
        raise ValueError(f"variant {variant!r} is not one of {kind}, the format of {path}; there are {has}")
    return _READERS[kind](path, sites, variant)


def detect(path: Path) -> str | None:
    """The format of a file or folder, None if it is that of no SAE."""
    if path.is_file():
        by_suffix = {".npz": "gemma_scope", ".pt": "dictionary_learning"}
        return "layer_files" if layer_files.NAME.fullmatch(path.name) else by_suffix.get(path.suffix)
    for file, kind in _MARKS.items():
        if (path / file).is_file():
            return kind
    if not (path / saelens.CONFIG).is_file():
        return "saelens" if (path / saelens.WEIGHTS).is_file() else None
    try:
        cfg = json.loads((path / saelens.CONFIG).read_text())
    except ValueError:
        return "saelens"  # whose reader says what is wrong with the file
    keys = cfg.keys() if isinstance(cfg, dict) else set()
    return "saex" if "l1_coefficient" in keys and not keys & {"metadata", "hook_name", "hook_point"} else "saelens"


def _locate(name: str, revision: str | None) -> Path:
    """The folder or file of that name, from the hub if it is not here."""
    asked, name = name, resolve(gemma_scope.resolve(name))
    if found := _match(Path(name)):
        return found
    name = gemma_scope.on_hub(name)
    repo, inside = _split(name)
    if not repo:
        raise FileNotFoundError(nothing_at(asked, "a folder with an SAE, or owner/repository/path on the hub"))
    one_file = inside.endswith(_SUFFIXES)
    patterns = [inside] if one_file else [f"{inside}/{file}".lstrip("/") for file in _FILES]
    if inside.endswith((".safetensors", ".npz")) or not one_file:  # its settings
        folder = str(Path(inside).parent) if one_file else inside
        patterns += [f"{folder}/{file}".removeprefix("./").lstrip("/") for file in common.BESIDE]
    if inside.endswith(".pt"):
        patterns += [f"{folder}/{dictionary_learning.CONFIG}" for folder in list(Path(inside).parents)[:2]]
    root = fetch_folder(repo, revision, patterns, "the files of an SAE", asked)
    if found := _match(root / inside):
        return found
    raise FileNotFoundError(_absent(repo, inside or "SAE at its root", revision) + gemma_scope.others(name))


def is_one(name: str) -> bool:
    """Whether a name can only be that of one SAE: a file, one of Gemma Scope's, or a pattern (its first match)."""
    last = Path(name).name
    return last.endswith(_SUFFIXES) or "*" in last or last == "canonical"


def fetch_suite(name: str, revision: str | None) -> Path:
    """The folder of that name, or a snapshot of all SAE files at and below `owner/repository/path` on the hub.

    Raises `FileNotFoundError` if it is neither, and `ValueError` for what is published with many SAEs at one site.
    """
    folder = Path(resolve(name))
    if folder.is_dir():
        return folder
    gemma_scope.refuse_all(name)
    repo, inside = _split(gemma_scope.on_hub(name))
    if not repo:
        wanted = "a suite: a folder of SAEs, owner/repository/path on the hub, or either with {layer} in its name"
        raise FileNotFoundError(nothing_at(name, wanted))
    root = fetch_folder(repo, revision, [f"{inside}/{pattern}".lstrip("/") for pattern in _ANYWHERE], "SAEs", name)
    if not (root / inside).is_dir():
        raise FileNotFoundError(f"no folder {name!r} here, and " + _absent(repo, inside, revision))
    return root / inside


def _split(name: str) -> tuple[str, str]:
    """Repository on the hub and path in it; empty for what can only be a path here, as below a folder that is there."""
    parts = name.strip("/").split("/")
    repo = "/".join(parts[:2])
    here = len(parts) < 2 or name.startswith(("/", ".", "~")) or located(repo, "model").is_dir()
    return ("", "") if here else (repo, "/".join(parts[2:]))


def _absent(repo: str, what: str, revision: str | None) -> str:
    at = f" at {revision}" if revision else ""
    tree = f"https://huggingface.co/{repo}/tree/{revision or 'main'}"
    return f"the repository {repo} has no {what}{at}: {tree} shows what it has"


def _match(path: Path) -> Path | None:
    """`path` if it exists; with `*` in its last part, the first that matches."""
    if "*" in path.name:
        found = path.parent.glob(path.name)
        return next(iter(sorted(each for each in found if not each.name.startswith("."))), None)  # hidden: not data
    return path if path.exists() else None
