"""Few-shot prompts of a task, tokenised, with the role of every token and the pair that it belongs to."""

import dataclasses
from collections.abc import Sequence
from random import Random

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.tasks.tables import Pairs
from icl_lib.tasks.tasks import Task
from icl_lib.tasks.template import DUMMY, NO_PAIR, Role, Template, pad_of, tokenise

PAPER_TEMPLATE = Template()


class _Label:
    """Texts and task name of prompts: equal to any other label, so that no function is compiled once per text."""

    def __init__(self, texts, task):
        self.texts, self.task = texts, task

    def __eq__(self, other) -> bool:
        return isinstance(other, _Label)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"_Label({self.task!r})"


class Prompts(eqx.Module):
    """A batch of prompts, right padded, each ending with the query pair and its answer.

    `pair` is the index of the pair a token belongs to: examples 0, 1, ..., then the query, which is the largest; -2 on
    the dummy line, -1 elsewhere. A newline belongs to the pair before it. `answer` marks the tokens of the query's
    answer. Stacked prompts (`stack_prompts`) have a leading axis of tasks, and `n_shots` is a tuple if it differs.
    """

    tokens: Int[Array, "*tasks batch seq"]
    roles: Int[Array, "*tasks batch seq"]
    pair: Int[Array, "*tasks batch seq"]
    answer: Bool[Array, "*tasks batch seq"]
    n_shots: int | tuple[int, ...] = eqx.field(static=True)
    template: Template = eqx.field(static=True)
    pad_id: int = eqx.field(static=True)
    label: _Label = eqx.field(static=True)

    @property
    def texts(self) -> tuple:
        """The prompts as strings; for stacked prompts one tuple of them per task. Not kept up to date under `jit`."""
        return self.label.texts

    @property
    def task(self) -> str | tuple[str, ...]:
        """Name of the task; for stacked prompts a tuple. Not kept up to date under `jit`."""
        return self.label.task

    def mask(self, role: Role | int, scheme: str = "all") -> Bool[Array, "*tasks batch seq"]:
        """Tokens of a role, the dummy line's included: "all" of them, or the "first" or "last" of each word or arrow.

        Raises `ValueError` on an unknown role or scheme.
        """
        if scheme not in ("all", "first", "last"):
            raise ValueError(f"scheme is 'all', 'first' or 'last', got {scheme!r}")
        member = self.roles == int(Role(role))
        if scheme == "all":
            return member
        same = lambda x: x[..., 1:] == x[..., :-1]
        joined = same(self.roles) & same(self.pair)  # token j + 1 goes on with what token j is in
        end = jnp.zeros_like(joined[..., :1])
        parts = [end, joined] if scheme == "first" else [joined, end]
        return member & ~jnp.concatenate(parts, axis=-1)

    @property
    def real(self) -> Bool[Array, "*tasks batch seq"]:
        """Tokens that count: neither BOS nor padding, whatever ids these have. The one mask of prompts."""
        return self.roles != int(Role.OTHER)

    def groups(self) -> tuple[Int[Array, "*tasks batch seq"], tuple[str, ...]]:
        """The role under which each token is part of the nodes of a circuit (0: of none), and the roles' names.

        Of a word or an arrow only the last token counts; BOS, padding and the answer of the query never do.
        Source: ICL-SFC, Sec. 4.1.1, and the authors' code, which takes the last token of a word.
        """
        index = jnp.zeros_like(self.roles)
        for role in list(Role)[1:]:
            scheme = "last" if role in (Role.INPUT, Role.ARROW, Role.OUTPUT) else "all"
            index = jnp.where(self.mask(role, scheme) & ~self.answer, jnp.asarray(int(role), index.dtype), index)
        return index, ("none", *(role.name for role in list(Role)[1:]))

    @property
    def query_arrow(self) -> Int[Array, "*tasks batch"]:
        """Position of the last token of the query's arrow, from which the answer is predicted."""
        return _last(self.mask(Role.ARROW) & (self.pair == self.pair.max(axis=-1, keepdims=True)))

    @property
    def dummy_output(self) -> Int[Array, "*tasks batch"]:
        """Position of the last token of the dummy's output "Y". Raises `ValueError` if the template has no dummy."""
        if self.template.dummy is None:
            raise ValueError("these prompts have no dummy line: make them with template=Template(dummy=('X', 'Y'))")
        return _last(self.mask(Role.OUTPUT) & (self.pair == DUMMY))


def _last(mask: Bool[Array, "*axes seq"]) -> Int[Array, "*axes"]:
    return (mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)).astype(jnp.int32)


def make_prompts(
    task: Task,
    tokenizer,
    *,
    n_prompts: int,
    n_shots: int,
    seed: int,
    pool: str | Sequence[tuple[str, str]] | None = None,
    query_pool: str | Sequence[tuple[str, str]] | None = None,
    template: Template = PAPER_TEMPLATE,
    length: int | None = None,
    n_ctx: int | None = None,
    corrupt: bool = False,
) -> Prompts:
    """Random prompts of a task: `n_shots` example pairs, then the query pair with its answer.

    Examples come from `pool`, queries from `query_pool`: the name of a pool of the task, pairs, or None for all pairs
    (for queries: the same as `pool`). Inside a prompt no input is shown twice, the query's included; of an input with
    several outputs one is drawn. Between prompts pairs may repeat. `corrupt` replaces each example's output by an
    output of the task that is wrong for it, drawn apart, so that inputs and queries are those of the clean prompts of
    the same seed.

    The tokenizer's BOS, if it has one that is not its end of text too, comes first. Prompts are right padded to
    `length` (None: the longest prompt) with the tokenizer's pad id, without one its end of text, without that 0, as
    `ModelConfig` does it; since such an id can be a model's BOS or word too, whatever counts tokens of prompts takes
    `Prompts.real`.

    Raises `ValueError` if the pool is too small, a prompt is longer than `length` or than the model's context `n_ctx`,
    the tokenizer is not a fast one, or it merges visible characters of two roles into one token (see
    `template.tokenise`).
    """
    shots = _pairs(task, pool)
    queries = shots if query_pool is None else _pairs(task, query_pool)
    rng = Random(seed)
    drawn = [_draw(task, shots, queries, n_shots, rng) for _ in range(n_prompts)]
    if corrupt:
        rng = Random(f"corrupt {seed}")
        drawn = [[*_corrupted(task, pairs[:-1], rng), pairs[-1]] for pairs in drawn]
    layouts = [template.layout(pairs) for pairs in drawn]
    rows = tokenise(layouts, tokenizer)
    pad_id = pad_of(tokenizer)
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(
            f"a prompt of task {task.name!r} has {longest} tokens, more than {length=}: raise it, or lower n_shots"
        )
    if n_ctx is not None and length > n_ctx:
        raise ValueError(
            f"prompts of task {task.name!r} with {n_shots + 1} pairs are {length} tokens long, more than the model's "
            f"context of {n_ctx}: lower n_shots{' or length' * (length > longest)}"
        )
    table = np.full((n_prompts, length, 3), (pad_id, Role.OTHER, NO_PAIR), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    tokens, roles, pair = np.moveaxis(table, -1, 0)
    return Prompts(
        tokens=jnp.asarray(tokens),
        roles=jnp.asarray(roles),
        pair=jnp.asarray(pair),
        answer=jnp.asarray((roles == Role.OUTPUT) & (pair == n_shots)),
        n_shots=n_shots,
        template=template,
        pad_id=pad_id,
        label=_Label(tuple("".join(span.text for span in layout) for layout in layouts), task.name),
    )


def stack_prompts(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of several tasks as one, with a leading axis of tasks, all padded to the longest.

    Raises `ValueError` if they differ in number of prompts, in template or in pad id.
    """
    if not prompts:
        raise ValueError("stack_prompts needs at least one batch of prompts, got none")
    kinds = {(p.tokens.shape[:-1], p.template, p.pad_id) for p in prompts}
    if len(kinds) > 1:
        raise ValueError(f"stacked prompts need one batch size, template and pad id, got {sorted(kinds, key=str)}")
    seq = max(p.tokens.shape[-1] for p in prompts)

    def stacked(name: str, fill) -> Array:
        arrays = [getattr(p, name) for p in prompts]
        widths = [[(0, 0)] * (a.ndim - 1) + [(0, seq - a.shape[-1])] for a in arrays]
        return jnp.stack([jnp.pad(a, w, constant_values=fill) for a, w in zip(arrays, widths, strict=True)])

    shots = tuple(p.n_shots for p in prompts)
    return dataclasses.replace(
        prompts[0],
        tokens=stacked("tokens", prompts[0].pad_id),
        roles=stacked("roles", int(Role.OTHER)),
        pair=stacked("pair", NO_PAIR),
        answer=stacked("answer", False),
        n_shots=shots[0] if len(set(shots)) == 1 else shots,
        label=_Label(tuple(p.texts for p in prompts), tuple(p.task for p in prompts)),
    )


def _pairs(task: Task, pool: str | Sequence[tuple[str, str]] | None) -> Pairs:
    if pool is None:
        return task.pairs
    pairs = task.pool(pool) if isinstance(pool, str) else tuple(pool)
    if not pairs:
        raise ValueError(f"an empty pool was given for the prompts of task {task.name!r}")
    return pairs


def _draw(task: Task, shots: Pairs, queries: Pairs, n_shots: int, rng: Random) -> list[tuple[str, str]]:
    """Examples and query of one prompt, the query last."""
    query = rng.choice(queries)
    outputs: dict[str, list[str]] = {}
    for x, y in shots:
        if x != query[0]:
            outputs.setdefault(x, []).append(y)
    if len(outputs) < n_shots:
        raise ValueError(
            f"task {task.name!r} has {len(outputs)} pairs besides the query to draw {n_shots} examples from, "
            "one an input: lower n_shots or give a larger pool"
        )
    examples = [(x, outputs[x]) for x in rng.sample(list(outputs), n_shots)]
    return [*((x, ys[0] if len(ys) == 1 else rng.choice(ys)) for x, ys in examples), query]


def _corrupted(task: Task, pairs: Sequence[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """The pairs, each with an output of the task that is none of its input's own."""
    true, outputs = set(task.pairs), sorted({y for _, y in task.pairs})
    wrong = [[other for other in outputs if other != y and (x, other) not in true] for x, y in pairs]
    if not all(wrong):
        found = f"one output only, {outputs[0]!r}" if len(outputs) == 1 else "an input for which no output is wrong"
        raise ValueError(f"task {task.name!r} has {found}: its prompts cannot be corrupted")
    return [(x, rng.choice(others)) for (x, _), others in zip(pairs, wrong, strict=True)]
