"""The state of a training job on disk, through orbax: written in the background, atomic, the last few kept.

A checkpoint is a folder that appears under its step by one rename when all of it is written, so that a job killed at
any moment finds whole checkpoints only. Each carries the configuration it was made with and is not given to another
one.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from icl_lib.training.recipes import TrainingError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports each phase of a save, and each error three times
_PRIMES = tuple(map(np.uint32, (2654435761, 2246822519, 3266489917, 668265263)))  # of the places in a checksum


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written, or that belongs to another configuration."""


class Checkpoints:
    """The last `keep` checkpoints of a job with the configuration `config`, in `folder`. All processes call every
    method; arrays are written by those that hold them, everything else by process 0."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any], keep: int = 2):
        self.folder, self.config = Path(folder).absolute(), dict(config)
        how = dict(max_to_keep=keep, cleanup_tmp_directories=True, step_format_fixed_length=9)
        open_ = lambda: ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(**how))
        self._manager = self._try("open", open_)

    def latest(self) -> int | None:
        """Step of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: PyTree, data: Mapping[str, Any]) -> None:
        """Write arrays and JSON in the background; returns when the arrays may be overwritten. Raises `CheckpointError`
        if this or the save before it fails; the checkpoints before are untouched."""
        job = json.loads(json.dumps({"config": self.config, "data": data}))  # as it is now: it is written later
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), job=ocp.args.JsonSave(job))
        self._try(f"write step {step} to", lambda: self._manager.save(step, args=items))

    def restore(self, abstract: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Step, arrays and JSON of the last checkpoint; None if there is none yet.

        `abstract` has the shapes, dtypes and shardings to restore to. Raises `CheckpointError` naming the fields in
        which the configuration differs, or the checkpoint if it cannot be read.
        """
        step = self.latest()
        if step is None:
            return None
        job = self._read(step, "job", ocp.args.JsonRestore())
        if differing := differences(job["config"], self.config):
            made = f"the checkpoint in {self.folder} (step {step}) was made with another configuration"
            todo = "Set these back to go on with it, or choose another folder to start anew"
            raise CheckpointError(f"{made}: {'; '.join(differing)}. {todo}")
        return step, self._read(step, "arrays", ocp.args.StandardRestore(abstract)), job["data"]

    def wait(self) -> None:
        """Until all is on disk. Raises `CheckpointError` if a save failed."""
        self._try("finish writing", self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait for what is being written; a failure was or will be reported by `save` or `wait`."""
        try:
            self._manager.close()
        except Exception as err:
            logging.getLogger(__name__).warning("closing the checkpoints in %s: %s", self.folder, err)

    def _read(self, step: int, item: str, how) -> Any:
        """One item of a checkpoint. A damaged one is left where it is: the disk may be at fault."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as err:  # orbax and tensorstore raise many kinds
            earlier = [other for other in self._manager.all_steps() if other < step]
            start = f"from step {max(earlier)}" if earlier else "from the beginning, for there is none before it"
            todo = f"delete the folder {self.folder / f'{step:09d}'} and start again with the same settings"
            what = f"could not read step {step} of {self.folder}: {_brief(err)}"
            damaged = f"If it stays so, the checkpoint is damaged: {todo}: the job goes on {start}"
            raise CheckpointError(f"{what}. {damaged}") from err

    def _try(self, what: str, action):
        try:
            return action()
        except CheckpointError:
            raise
        except Exception as err:  # orbax and tensorstore raise many kinds
            kept = sorted(int(p.name) for p in self.folder.glob("[0-9]*") if p.name.isdigit())
            there = f"Whole checkpoints there: {', '.join(map(str, kept)) or 'none'}"
            todo = "Is the disk full? Make room and start again with the same settings: the job goes on from the last"
            raise CheckpointError(f"could not {what} {self.folder}: {_brief(err)}. {there}. {todo}") from err


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Every field in which two configurations differ, nested ones by path: "recipe.d_sae is 512 there, 1024 here"."""
    there, here = _flat(there), _flat(here)
    show = lambda values, k: repr(values[k]) if k in values else "absent"
    return [
        f"{key} is {show(there, key)} there, {show(here, key)} here"
        for key in sorted({*there, *here})
        if there.get(key, "absent") != here.get(key, "absent")
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping | list | tuple):
        return {prefix: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {k: v for key, each in items for k, v in _flat(each, f"{prefix}.{key}" if prefix else str(key)).items()}


def _brief(err: BaseException) -> str:
    """Start and end of a message: tensorstore names the operation first and the cause last, with long paths between."""
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text if len(text) < 300 else f'{text[:120]} ... {text[-150:]}'}"


def fingerprint(model: PyTree) -> str:
    """Tells models apart by the bits of every weight. Sums of integers are the same in any order, on any devices."""
    sums = jnp.stack([_checksum(w) for w in jax.tree.leaves(model) if eqx.is_inexact_array(w)])
    return hashlib.sha256(np.asarray(sums).tobytes()).hexdigest()[:16]


@jax.jit
def _checksum(w: Array) -> Array:
    r"""$\sum_i b_i m_i$ modulo $2^{32}$ of the bits b, with an odd m that differs from place to place."""
    bits = jax.lax.bitcast_convert_type(w, f"uint{8 * w.dtype.itemsize}").astype(jnp.uint32)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, w.shape)
    places = [iota(axis) * prime for axis, prime in zip(range(w.ndim), _PRIMES, strict=False)]
    return jnp.sum(bits * (2 * sum(places, jnp.uint32(0)) + 1), dtype=jnp.uint32)
