"""Few-shot prompts, tokenised, with the role of every token found from character offsets and never from token ids."""

import dataclasses
import enum
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.tasks.tasks import Pairs, Task

DUMMY = -2  # pair index of the dummy line
NO_PAIR = -1  # pair index of what belongs to no pair: BOS, the instruction, padding


class Role(enum.IntEnum):
    """What a token is in a prompt."""

    OTHER = 0  # BOS and padding
    PROMPT = 1  # the instruction
    INPUT = 2
    ARROW = 3  # the separator between input and output
    OUTPUT = 4
    NEWLINE = 5  # between pairs; the one that ends the instruction is PROMPT


@dataclasses.dataclass(frozen=True)
class Template:
    r"""The words around the pairs: "{prefix}{x}{separator}{y}{newline}{x}{separator}{y}...", ending with an output.

    `dummy` is a pair of stand-ins put before the examples, ("X", "Y") for the line "X -> Y". Raises `ValueError` if the
    separator or the newline is nothing but spaces, since then no token could carry its role.
    """

    prefix: str = "Follow the pattern:\n"
    separator: str = " -> "
    newline: str = "\n"
    dummy: tuple[str, str] | None = None

    def __post_init__(self):
        for name in ("separator", "newline"):
            if not getattr(self, name).strip(" \t"):
                raise ValueError(f"the {name} of a template needs a character other than a space, got {getattr(self, name)!r}")


class _Span(NamedTuple):
    """A run of characters with one role in one pair."""

    text: str
    role: Role
    pair: int


class _Label:
    """Texts and task name of prompts: equal to any other label, so that jitted functions do not compile once per text."""

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
    template: Template = Template(),
    length: int | None = None,
    corrupt: bool = False,
) -> Prompts:
    """Random prompts of a task: `n_shots` example pairs, then the query pair with its answer.

    Examples come from `pool`, queries from `query_pool`: the name of a pool of the task, pairs, or None for all pairs
    (for queries: the same as `pool`). Inside a prompt no pair is repeated and no example has the query's input; between
    prompts pairs may repeat. `corrupt` replaces each example's output by another output of the task, drawn apart, so
    that inputs and queries are those of the clean prompts of the same seed. Right padded to `length` (None: the
    longest prompt) with the tokenizer's pad id (0 if it has none); its BOS, if any, comes first.

    Raises `ValueError` if the pool is too small, a prompt is longer than `length`, the tokenizer is not a fast one, or
    it merges characters of two roles into one token.
    """
    shots = _pairs(task, pool)
    queries = shots if query_pool is None else _pairs(task, query_pool)
    rng = Random(seed)
    drawn = [_draw(task, shots, queries, n_shots, rng) for _ in range(n_prompts)]
    if corrupt:
        rng = Random(f"corrupt {seed}")
        drawn = [[*_corrupted(task, pairs[:-1], rng), pairs[-1]] for pairs in drawn]
    layouts = [_layout(template, pairs) for pairs in drawn]
    texts = tuple("".join(span.text for span in layout) for layout in layouts)
    rows = _tokenise(layouts, texts, tokenizer)
    pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    longest = max(len(row) for row in rows)
    if length is not None and longest > length:
        raise ValueError(f"a prompt of task {task.name!r} has {longest} tokens, more than {length=}: raise it, or lower n_shots")
    table = np.full((n_prompts, longest if length is None else length, 3), (pad_id, Role.OTHER, NO_PAIR), np.int32)
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
        label=_Label(texts, task.name),
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
    return Prompts(
        tokens=stacked("tokens", prompts[0].pad_id),
        roles=stacked("roles", int(Role.OTHER)),
        pair=stacked("pair", NO_PAIR),
        answer=stacked("answer", False),
        n_shots=shots[0] if len(set(shots)) == 1 else shots,
        template=prompts[0].template,
        pad_id=prompts[0].pad_id,
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
    others = [pair for pair in shots if pair[0] != query[0]]
    if len(others) < n_shots:
        raise ValueError(
            f"task {task.name!r} has {len(others)} pairs besides the query to draw {n_shots} examples from: "
            "lower n_shots or give a larger pool"
        )
    return [*rng.sample(others, n_shots), query]


def _corrupted(task: Task, pairs: Sequence[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """The pairs, each with another output of the task than its own."""
    outputs = sorted({y for _, y in task.pairs})
    if len(outputs) < 2:
        raise ValueError(f"task {task.name!r} has one output only, {outputs[0]!r}: its prompts cannot be corrupted")
    return [(x, rng.choice([other for other in outputs if other != y])) for x, y in pairs]


def _layout(template: Template, pairs: Sequence[tuple[str, str]]) -> list[_Span]:
    """The prompt as consecutive runs of characters."""
    numbered = list(enumerate(pairs))
    if template.dummy is not None:
        numbered.insert(0, (DUMMY, template.dummy))
    spans = [_Span(template.prefix, Role.PROMPT, NO_PAIR)]
    for i, (x, y) in numbered:
        spans += [_Span(x, Role.INPUT, i), _Span(template.separator, Role.ARROW, i), _Span(y, Role.OUTPUT, i)]
        spans.append(_Span(template.newline, Role.NEWLINE, i))
    return spans[:-1]  # nothing after the answer of the query


def _tokenise(layouts: list[list[_Span]], texts: Sequence[str], tokenizer) -> list[list[tuple[int, int, int]]]:
    """(token, role, pair) for the tokens of each text, BOS first."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, from which the roles of tokens are found: "
            "use a fast tokenizer (one with a tokenizer.json)"
        )
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    bos = [] if tokenizer.bos_token_id is None else [(int(tokenizer.bos_token_id), int(Role.OTHER), NO_PAIR)]
    rows = []
    for layout, text, ids, offsets in zip(layouts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        owners = _owners(layout, text, offsets)
        rows.append(bos + [(t, int(layout[o].role), layout[o].pair) for t, o in zip(ids, owners, strict=True)])
    return rows


def _owners(layout: list[_Span], text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Index of the span that each token belongs to.

    Spaces do not count: a BPE token such as " Paris" carries the space before its word, and some tokenizers leave that
    space out of the offsets. A token of spaces alone belongs to what follows it.
    """
    owner = np.repeat(np.arange(len(layout)), [len(span.text) for span in layout])
    solid = np.flatnonzero([c not in " \t" for c in text])
    found = []
    for start, end in offsets:
        i, j = np.searchsorted(solid, (start, end))
        inside = owner[solid[i:j]] if j > i else owner[solid[min(i, len(solid) - 1)]][None]
        if inside[0] != inside[-1]:
            roles = [layout[k].role.name for k in np.unique(inside)]
            raise ValueError(
                f"the token {text[start:end]!r} spans {' and '.join(roles)} in {text[max(0, start - 20) : end + 20]!r}: this "
                "tokenizer merges the separator or newline with its neighbour; choose a Template whose separator it "
                "keeps apart, for instance with spaces around it"
            )
        found.append(int(inside[0]))
    return found
