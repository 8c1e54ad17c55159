"""Activations of all sites in a shuffle buffer on the device: every language-model pass replaces the oldest part of it.

SAE steps draw rows at random from the whole buffer, so that neighbouring tokens of a text do not meet in a batch.
Nothing is copied to the host. A checkpoint keeps the *tokens* of the passes that fill the buffer, thousands of times
smaller than their activations; running these passes again in the same order gives the same buffer, bit for bit.
"""

import collections
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from icl_lib.models import Site, Transformer
from icl_lib.models.sharding import mesh_of
from icl_lib.models.sites import GLOBAL_SITES, LAYER_SITES, activations_at, check_sites
from icl_lib.text.corpus import Corpus
from icl_lib.text.tokens import check_tokens, token_mask
from icl_lib.training.progress import Progress
from icl_lib.training.recipes import TrainingError


class ActivationBuffer:
    """A ring of `passes` language-model passes over `contexts` contexts each, for `sites`, in `dtype`.

    A pass gives contexts x (seq - 1) rows. Where BOS and padding leave fewer tokens, some of them are there twice. With
    a `mesh` rows lie across all of its devices, and each process reads its share of the contexts. The model may be
    divided over the same devices, in the same order (`make_mesh`); a context then goes to each device that has a part
    of one copy.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        sites: Iterable[Site | str],
        *,
        contexts: int,
        passes: int,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        self.sites = tuple(sorted(check_sites(model.config, sites), key=_order))
        self._model, self._corpus, self._mesh = model, corpus, mesh
        n_processes, n_devices = jax.process_count(), 1 if mesh is None else mesh.size
        self.tokens_per_pass = contexts * (corpus.seq - (model.config.bos_id is not None))  # rows that a pass replaces
        if min(contexts, passes) < 1 or contexts % n_devices or contexts % n_processes:
            wanted = f"{contexts} contexts must be a multiple of {n_devices} devices and {n_processes} processes"
            raise TrainingError(f"{wanted}, and at least one pass is kept, got {passes}: change contexts or passes")
        self._local, self._passes = contexts // n_processes, passes
        self._recent: collections.deque[np.ndarray] = collections.deque(maxlen=passes)
        self._n_passes = 0
        self._rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._bad = _place(np.full(len(self.sites), -1, np.int32), whole)
        self._tokens = self._sharding_of_tokens(contexts)
        shape = lambda site: (passes * self.tokens_per_pass, model.config.width(site.name))
        self.rows: dict[Site, Array] = {site: self._zeros(shape(site), dtype) for site in self.sites}

    def fill(self, say: Callable[[Progress], None] | None = None, every: float = 5.0) -> None:
        """All passes of a new buffer; `say` is told before the first, which is compiled, and then `every` so many
        seconds.

        Raises `CorpusError` if the text is too short.
        """
        for _ in self._told(range(self._passes), say, every):
            self.refill(step=0)

    def _told(
        self, passes: Sequence | np.ndarray, say: Callable[[Progress], None] | None, every: float
    ) -> Iterator[Any]:
        """The passes, one after the other. Speed is that since the first, which holds the compilation."""
        n, doing = len(passes), "filling the activation buffer (compiling first): pass"
        last = first = time.perf_counter()
        if say is not None:
            say(Progress(0, n, 0.0, math.inf, doing=doing))
        for i, each in enumerate(passes, 1):
            yield each
            jax.block_until_ready(self._bad)
            now = time.perf_counter()
            first = now if i == 1 else first
            if say is not None and (i == n or now - last >= every):
                per_second = (i - 1) / max(now - first, 1e-9)
                left = (n - i) / per_second if per_second else 0.0 if i == n else math.inf
                doing = "filling the activation buffer: pass"
                say(Progress(i, n, per_second * self.tokens_per_pass, left, doing=doing))
                last = now

    def refill(self, step: int) -> None:
        """One pass over the next contexts in place of the oldest; `step` is named if its activations are not finite."""
        tokens = self._corpus.batch(self._local)
        check_tokens(tokens, self._model.config)
        if not np.any(token_mask(tokens, self._model.config)):
            empty = f"the {len(tokens)} contexts of the pass at step {step} hold nothing but BOS and padding"
            raise TrainingError(f"{empty}: check the text and its tokenizer")
        self._recent.append(tokens)
        self._run(tokens, self._n_passes, step)
        self._n_passes += 1

    def first_bad(self) -> tuple[Site, int] | None:
        """Site and step of the first activation that is not finite, if any. It waits for the device."""
        bad = np.asarray(self._bad)
        if (bad < 0).all():
            return None
        i = int(np.argmin(np.where(bad >= 0, bad, np.iinfo(np.int32).max)))
        return self.sites[i], int(bad[i])

    def state(self) -> tuple[dict[str, Any], np.ndarray]:
        """What a checkpoint needs: JSON, and the tokens (processes, passes, contexts, seq) that are in the buffer."""
        states = _gather_json(self._corpus.state_dict())
        recent = np.stack(self._recent)
        tokens = np.asarray(multihost_utils.process_allgather(recent)) if jax.process_count() > 1 else recent[None]
        return {"corpus": states, "n_passes": self._n_passes}, tokens

    def abstract_tokens(self) -> np.ndarray:
        """An array of the shape of the tokens of `state`."""
        return np.zeros((jax.process_count(), self._passes, self._local, self._corpus.seq), np.int32)

    def load(
        self,
        state: dict[str, Any],
        tokens: np.ndarray,
        say: Callable[[Progress], None] | None = None,
        every: float = 5.0,
    ) -> None:
        """Fill the buffer as it was when `state` was taken, by the same passes, told like those of `fill`."""
        mine = np.asarray(tokens)[jax.process_index()]
        self._corpus.load_state_dict(state["corpus"][jax.process_index()])
        self._n_passes = int(state["n_passes"])
        for i, batch in enumerate(self._told(mine, say, every), self._n_passes - len(mine)):
            self._recent.append(batch)
            self._run(batch, i, 0)

    def _run(self, tokens: np.ndarray, number: int, step: int) -> None:
        at, now = np.int32(number % self._passes * self.tokens_per_pass), np.int32(step)
        inputs = (self._model, _place(tokens, self._tokens), self.sites, at, now, self._rows)
        self.rows, self._bad = _refill(inputs, self.rows, self._bad)

    def _sharding_of_tokens(self, contexts: int) -> NamedSharding | None:
        """Contexts over the copies of the model, so that the devices of one copy work on the same ones."""
        of_model = mesh_of(self._model)
        if self._mesh is None or of_model is None:
            return self._rows
        sharding = NamedSharding(of_model, PartitionSpec("data"))
        mine = {str(where) for where in sharding.addressable_devices_indices_map((contexts,)).values()}
        if len(mine) * jax.process_count() != of_model.shape["data"]:
            there = f"{jax.process_count()} processes of {jax.local_device_count()} devices"
            has = f"its mesh is {dict(of_model.shape)}, and there are {there}"
            raise TrainingError(f"a copy of the model must be on devices of one process: {has}: divide it over fewer")
        return sharding

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Made on its shards; no device ever holds all of it."""
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self._rows)()


def _order(site: Site) -> tuple[int, int]:
    """The order of computation, so that the first of several bad activations is the cause of the others."""
    return -1 if site.layer is None else site.layer, [*LAYER_SITES, *GLOBAL_SITES].index(site.name)


@eqx.filter_jit(donate="all-except-first")
def _refill(inputs, rows: dict[Site, Array], bad: Array):
    """`rows` with a pass written at row `at`, and `bad` with the step of each site's first pass that is not finite."""
    model, tokens, sites, at, step, place = inputs
    cache = activations_at(model, tokens, sites)
    n = tokens.size - tokens.shape[0] * (model.config.bos_id is not None)
    keep = token_mask(tokens, model.config).ravel()
    order = jnp.argsort(~keep, stable=True)  # tokens that count come first
    index = order[jnp.arange(n, dtype=jnp.int32) % jnp.maximum(1, jnp.sum(keep, dtype=jnp.int32))]
    new = {s: cache[s].reshape(-1, r.shape[1])[index].astype(r.dtype) for s, r in rows.items()}
    finite = jnp.stack([jnp.all(jnp.isfinite(new[s])) for s in sites])
    if place is None:
        written = {s: jax.lax.dynamic_update_slice(r, new[s], (at, jnp.zeros_like(at))) for s, r in rows.items()}
    else:  # where they were: left alone, the compiler might prefer the places of a divided model's activations
        written = jax.lax.with_sharding_constraint({s: _written(r, new[s], at) for s, r in rows.items()}, place)
    return written, jnp.where((bad < 0) & ~finite, step, bad)


def _written(rows: Array, new: Array, at: Array) -> Array:
    """`rows` with `new` from row `at` on, where rows are divided: to write a slice each device would hold all."""
    i = jnp.arange(len(rows), dtype=jnp.int32) - at
    return jnp.where(((i >= 0) & (i < len(new)))[:, None], new[jnp.clip(i, 0, len(new) - 1)], rows)


def _place(x: np.ndarray, sharding: NamedSharding | None) -> Array:
    return jnp.asarray(x) if sharding is None else jax.make_array_from_process_local_data(sharding, x)


def _gather_json(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes, in their order, known to every one of them."""
    if jax.process_count() == 1:
        return [state]
    gather = lambda x: np.asarray(multihost_utils.process_allgather(x))
    data = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = gather(np.asarray([len(data)], np.int32)).ravel()
    padded = gather(np.pad(data, (0, int(lengths.max()) - len(data)))).reshape(len(lengths), -1)
    return [json.loads(bytes(row[:n]).decode()) for row, n in zip(padded, lengths, strict=True)]
