"""The words around the pairs of a prompt, and the role of every token, found from character offsets, never from ids."""

import dataclasses
import enum
import itertools
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DUMMY = -2  # pair index of the dummy line
NO_PAIR = -1  # pair index of what belongs to no pair: BOS, the instruction, padding
BLANKS = " \t"


class Role(enum.IntEnum):
    """What a token is in a prompt."""

    OTHER = 0  # BOS and padding
    PROMPT = 1  # the instruction
    INPUT = 2
    ARROW = 3  # the separator between input and output; of several tokens, the last predicts the output
    OUTPUT = 4
    NEWLINE = 5  # between pairs; the one that ends the instruction is PROMPT


@dataclasses.dataclass(frozen=True)
class Template:
    r"""The words around the pairs: the prefix, then `pair` for every pair, `newline` between, an output at the end.

    The default is the paper's. A chat model's special tokens go into the prefix, "<start_of_turn>user\nFollow the ...";
    a tokenizer that has them encodes them as such. Hendel et al. (2023) is `Template(prefix="",
    pair="example:{x}->{y}")`, Todd et al. (2024) is `Template(prefix="", pair="Q: {x}\nA: {y}", newline="\n\n")`. What
    stands before `{x}` is part of the prefix in the first pair and of the newline in the others; what stands after
    `{y}` is part of the newline, and left out after the query. `dummy` is a pair of stand-ins put before the examples,
    ("X", "Y") for the line "X -> Y".

    Raises `ValueError` if `pair` is not a text with one {x} and then one {y}, or if there are only blanks between {x}
    and {y} or between two pairs, since then no token could carry that role.
    """

    prefix: str = "Follow the pattern:\n"
    pair: str = "{x} -> {y}"
    newline: str = "\n"
    dummy: tuple[str, str] | None = None

    def __post_init__(self):
        before, separator, after = self.parts
        for name, text in (("separator", separator), ("newline", after + self.newline + before)):
            if not text.strip(BLANKS):
                raise ValueError(f"the {name} of a template needs a character other than a space, got {text!r}")

    @property
    def parts(self) -> tuple[str, str, str]:
        """What `pair` has before {x}, between {x} and {y}, and after {y}."""
        try:
            fields = [tuple(field) for _, *field in string.Formatter().parse(self.pair) if field[0] is not None]
        except ValueError as error:
            raise ValueError(
                f"the pair of a template cannot be read ({error}), got {self.pair!r}: write other braces twice"
            ) from error
        if fields != [("x", "", None), ("y", "", None)]:
            raise ValueError(
                "the pair of a template is a text with one {x} and then one {y}, such as '{x} -> {y}'; got "
                f"{self.pair!r}"
            )
        before, between, after = self.pair.format(x="\0", y="\0").split("\0")
        return before, between, after

    @property
    def separator(self) -> str:
        """What stands between input and output, " -> "."""
        return self.parts[1]

    def layout(self, pairs: Sequence[tuple[str, str]]) -> list["Span"]:
        """The prompt of `pairs`, the query last, as consecutive runs of characters."""
        before, separator, after = self.parts
        numbered = list(enumerate(pairs))
        if self.dummy is not None:
            numbered.insert(0, (DUMMY, self.dummy))
        spans = [Span(self.prefix + before, Role.PROMPT, NO_PAIR)]
        for i, (x, y) in numbered:
            spans += [Span(x, Role.INPUT, i), Span(separator, Role.ARROW, i), Span(y, Role.OUTPUT, i)]
            spans.append(Span(after + self.newline + before, Role.NEWLINE, i))
        return spans[:-1]  # nothing after the answer of the query


class Span(NamedTuple):
    """A run of characters with one role in one pair."""

    text: str
    role: Role
    pair: int


def own_bos(tokenizer) -> int | None:
    """The token that opens every text, or None: that of GPT-2 and Pythia is the end of a text, and opens none."""
    bos = tokenizer.bos_token_id
    return None if bos is None or bos == tokenizer.eos_token_id else int(bos)


def pad_of(tokenizer) -> int:
    """What rows of tokens are filled up with: the tokenizer's pad id, without one its end of text, without that 0."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def encode(texts: Sequence[str], tokenizer):
    """Tokens without any special ones, and the characters of each. Raises `ValueError` on a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, from which the roles of tokens are found: "
            "use a fast tokenizer (one with a tokenizer.json)"
        )
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)


def tokenise(layouts: Sequence[Sequence[Span]], tokenizer) -> list[list[tuple[int, int, int]]]:
    """(token, role, pair) for the tokens of each prompt, BOS first (once, whoever brings it) if the tokenizer has one.

    A token belongs to the span of its characters, where whitespace counts for less than anything else: the blank in
    " Paris" or " ->" belongs to the word or the arrow, and so does a line end that the tokenizer merges with a word, as
    Qwen does in ".\\n". A token of blanks alone belongs to what follows, so the first token of an output comes right
    after its arrow.

    Raises `ValueError` if the tokenizer is not a fast one, puts visible characters of two roles into one token, or
    gives no token at all for an input, arrow or output.
    """
    texts = ["".join(span.text for span in layout) for layout in layouts]
    encoded = encode(texts, tokenizer)
    bos, rows = own_bos(tokenizer), []
    for layout, text, ids, offsets in zip(layouts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        owners = _owners(layout, text, offsets, tokenizer)
        row = [(int(t), int(layout[o].role), layout[o].pair) for t, o in zip(ids, owners, strict=True)]
        if bos is not None:  # a prefix may bring some
            row = [(bos, int(Role.OTHER), NO_PAIR), *itertools.dropwhile(lambda entry: entry[0] == bos, row)]
        rows.append(row)
    return rows


def _owners(layout: Sequence[Span], text: str, offsets: Sequence[tuple[int, int]], tokenizer) -> list[int]:
    """Index of the span that each token belongs to, by the rules of `tokenise`."""
    owner = np.repeat(np.arange(len(layout)), [len(span.text) for span in layout])
    visible = np.flatnonzero([not c.isspace() for c in text])
    no_blank = np.flatnonzero([c not in BLANKS for c in text])
    found = []
    for start, end in _by_character(text, offsets):
        inside = visible[slice(*np.searchsorted(visible, (start, end)))]
        if len(inside) and owner[inside[0]] != owner[inside[-1]]:
            roles = [layout[k].role.name for k in np.unique(owner[inside])]
            raise ValueError(
                f"the token {text[start:end]!r} of {_name(tokenizer)} spans {' and '.join(roles)} in "
                f"{text[max(0, start - 20) : end + 20]!r}: this tokenizer merges the separator or newline with its "
                "neighbour; choose a Template whose separator it keeps apart, for instance with spaces around it"
            )
        if not len(inside):
            inside = no_blank[np.searchsorted(no_blank, start) :]
        found.append(int(owner[inside[0] if len(inside) else no_blank[-1]]))
    _check_complete(layout, found, tokenizer)
    return found


def _by_character(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which the bytes of unknown characters are told apart.

    A unigram tokenizer with byte fallback takes a run of unknown characters, line ends too, as one piece, and gives
    each of the bytes the place of the whole piece.
    """
    out: list[tuple[int, int]] = []
    for (start, end), run in itertools.groupby(offsets):
        n_bytes = [len(c.encode()) for c in text[start:end]]
        if len(same := list(run)) == sum(n_bytes) and len(n_bytes) > 1:
            out += [(start + i, start + i + 1) for i, n in enumerate(n_bytes) for _ in range(n)]
        else:
            out += same
    return out


def _check_complete(layout: Sequence[Span], found: Sequence[int], tokenizer):
    """Raises `ValueError` if an input, arrow or output has no token."""
    for lost in sorted(set(range(len(layout))) - set(found)):
        span = layout[lost]
        if span.role in (Role.INPUT, Role.ARROW, Role.OUTPUT):
            raise ValueError(
                f"{_name(tokenizer)} gives no token for the {span.role.name} {span.text!r} of pair {span.pair}: it "
                "drops these characters or merges them with their neighbour; leave the pair out, or change the Template"
            )


def _name(tokenizer) -> str:
    """How messages call a tokenizer."""
    kind = type(tokenizer).__name__
    return f"{kind} ({tokenizer.name_or_path})" if getattr(tokenizer, "name_or_path", "") else kind
