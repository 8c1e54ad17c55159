"""The store of a run: what one notebook computed at cost and another reads.

An artefact is a data file (safetensors for arrays, Parquet for tables) and a manifest beside it:

    runs/tiny/store/task_vectors.json              names the data file and its hash; carries meta data and provenance
    runs/tiny/store/task_vectors-3f2a91c0.safetensors

A data file is named after its content and the manifest is replaced last, by one rename. An interrupted write therefore
leaves the earlier artefact whole, and a reader sees the old one or the new one, never a mixture. A reader checks the
hash, so a file that was cut short or edited is refused by name. Every artefact carries the parameters of the notebook
that made it and fingerprints of the files of its model and SAEs, and a reader whose own parameters or files differ is
refused, with the command that makes it anew.

Of several processes only the first writes; the others wait for it, so that all of them find the artefact afterwards.
"""

import datetime
import difflib
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

from icl_lib.files.hashes import code_version, fingerprint
from icl_lib.files.names import located
from icl_lib.files.paths import root, run_folder
from icl_lib.files.processes import is_writer, to_host, wait_for_all
from icl_lib.files.write import write_bytes
from icl_lib.runs.devices import describe
from icl_lib.runs.needs import makers

_NAMES_OF_THE_RUN = ("card", "run_dir")  # what a run is called and where it lies; nothing is computed from them
_NAME = re.compile(r"[A-Za-z0-9][\w.]*(-[\w.]+)*")


class StoreError(ValueError):
    """An artefact that is missing, damaged, or made under other circumstances than asked for."""


class Store:
    """The artefacts of one run, in `<run_dir>/store`, each with its parameters, code, inputs, device and time."""

    def __init__(self, run_dir: str | Path, card: Mapping[str, Any]):
        """`run_dir` counts from the repository root; `card` holds the parameters of the notebook, its `model` among
        them.

        Raises `StoreError` for a card without a model: what was computed with nobody knows what cannot be relied on.
        """
        if not card.get("model"):
            raise StoreError("a store takes the parameters that its artefacts are made with, at least `model`")
        self.run_dir = run_folder(run_dir)
        self.folder = self.run_dir / "store"
        self.card = json.loads(json.dumps(dict(card), default=_plain))
        self.files = _files(self.card)
        self.inputs: dict[str, str] = {}  # name -> hash of every artefact read so far: the inputs of what is saved next

    def save(self, name: str, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
        """Save named arrays (NumPy or JAX) and JSON-like `meta`. bfloat16 is kept as float32, which loses nothing."""
        data = safetensors.numpy.save({key: _array(name, key, x) for key, x in arrays.items()})
        self._write(name, data, "safetensors", meta)

    def load(self, name: str, expect: Mapping[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and meta data. `expect` names meta values that this reader relies on, such as the names of the tasks.

        Raises `StoreError` if the artefact is missing, cut short or altered, if its meta data differs from `expect`,
        or if it was made with another value of a parameter that both notebooks have, or with other files of the model
        or the SAEs.
        """
        data, manifest = self._read(name, "safetensors", expect)
        return safetensors.numpy.load(data), manifest["meta"]

    def save_table(self, name: str, table: pd.DataFrame, meta: Mapping[str, Any] | None = None) -> None:
        """Save a table; its index is not kept."""
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        self._write(name, buffer.getvalue(), "parquet", meta)

    def load_table(self, name: str, expect: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """A table. Raises `StoreError` as `load` does."""
        return pd.read_parquet(io.BytesIO(self._read(name, "parquet", expect)[0]))

    def names(self) -> list[str]:
        """The artefacts that are there."""
        return sorted(p.stem for p in self.folder.glob("*.json"))

    def has(self, name: str) -> bool:
        """Whether the artefact exists; says nothing about its health."""
        return name in self.names()

    def provenance(self, name: str) -> dict[str, Any]:
        """How an artefact was made: parameters, code version, inputs by hash, device and time."""
        return self._manifest(name)["provenance"]

    def _write(self, name: str, data: bytes, kind: str, meta: Mapping[str, Any] | None) -> None:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot name an artefact; use letters, digits, _ . and -")
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / f"{name}-{digest[:8]}.{kind}"
        manifest = {"file": path.name, "sha256": digest, "meta": dict(meta or {}), "files": self.files}
        manifest["provenance"] = self._provenance()
        text = json.dumps(manifest, indent=1, default=_plain)  # before any file is touched: meta may not be JSON
        before = self._previous(name)
        write_bytes(path, data)
        write_bytes(self.folder / f"{name}.json", text.encode())
        if before and before != path.name and is_writer():
            (self.folder / before).unlink(missing_ok=True)
        wait_for_all(f"{name} is saved")
        self.inputs.pop(name, None)

    def _read(self, name: str, kind: str, expect: Mapping[str, Any] | None) -> tuple[bytes, dict[str, Any]]:
        manifest = self._manifest(name)
        path = self.folder / manifest["file"]
        if path.suffix != f".{kind}":
            right = "load_table" if kind == "safetensors" else "load"
            raise StoreError(f"{name} is a {path.suffix[1:]} file, not {kind}; use {right}")
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise StoreError(
                f"{path} was cut short or altered after it was written ({len(data)} bytes); {self._remedy(name)}"
            )
        self._refuse_others(name, path, manifest, expect or {})
        self.inputs[name] = manifest["sha256"]
        return data, manifest

    def _refuse_others(self, name: str, path: Path, manifest: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
        """Raise `StoreError` naming the first thing that the artefact was made with and that is another one here."""
        made = manifest["provenance"]["params"]
        shared = {key: value for key, value in self.card.items() if key in made and key not in _NAMES_OF_THE_RUN}
        for have, want in ((made, shared), (manifest["meta"], expect)):
            for key, value in want.items():
                if have.get(key) != value:
                    raise StoreError(
                        f"{path} was made with {key} = {have.get(key)!r}, but {value!r} is expected here; "
                        f"{self._remedy(name)}"
                    )
        for key, now in self.files.items():
            if key in made and manifest["files"].get(key, now) != now:
                raise StoreError(f"{path} was made when {made[key]} held other files; {self._remedy(name)}")

    def _manifest(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise StoreError(f"{self.folder} has no {name!r}{self._nearest(name)}; {self._remedy(name)}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            [manifest[key] for key in ("file", "sha256", "meta", "files")], manifest["provenance"]["params"]
        except (ValueError, KeyError, TypeError) as err:
            raise StoreError(f"{path} was cut short or altered ({err}); {self._remedy(name)}") from err
        return manifest

    def _previous(self, name: str) -> str | None:
        """The data file of the artefact about to be replaced, if its manifest can be read."""
        try:
            return self._manifest(name)["file"]
        except StoreError:
            return None

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), n=1)
        return f" (there is {near[0]!r})" if near else ""

    def _remedy(self, name: str) -> str:
        """The command that makes an artefact."""
        maker = makers().get(name, "NAME")
        who = f"notebooks/{maker}.ipynb makes it" if name in makers() else "some notebook makes it"
        return (
            f"{who}, run that first: `papermill notebooks/{maker}.ipynb {_shown(self.run_dir)}/notebooks/{maker}.ipynb "
            "-f CARD --cwd notebooks`, or the whole card: `snakemake --configfile CARD --cores 2` (CARD is for example "
            "params/tiny.yaml)"
        )

    def _provenance(self) -> dict[str, Any]:
        return {
            "params": self.card,
            "code": code_version(),
            "inputs": dict(self.inputs),
            "device": describe(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _files(card: Mapping[str, Any]) -> dict[str, list[str]]:
    """Fingerprints of the folders that `model` and `saes` name; hub ids and patterns have none."""
    listed = {key: [card[key]] if isinstance(card[key], str) else card[key] for key in ("model", "saes") if key in card}
    folders = {key: [located(name, key) for name in some] for key, some in listed.items()}
    return {key: [fingerprint(folder) for folder in some if folder.is_dir()] for key, some in folders.items()}


def _array(name: str, key: str, x: Any) -> np.ndarray:
    """`x` as an array safetensors can hold."""
    x = to_host(x)
    if x.dtype.name == "bfloat16":
        x = x.astype(np.float32)
    if x.dtype.kind not in "biuf":
        raise StoreError(
            f"{name}: {key!r} has dtype {x.dtype}; save numbers as arrays, text in meta or with save_table"
        )
    return np.ascontiguousarray(x)


def _plain(value: Any) -> Any:
    """NumPy and JAX numbers and arrays, and paths, as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise StoreError(f"meta data must be numbers, text, lists and dictionaries; got {type(value).__name__}")


def _shown(path: Path) -> str:
    """A path as the user would write it: from the repository root where it lies below."""
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)
