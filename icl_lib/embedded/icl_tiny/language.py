r"""The small language of the embedded model: prompts and sentences that state the same facts.

Seven rows in ten are prompts in the paper's template, filled with pairs until the context is full, so that every
number of shots is trained at once. The others are plain text: sentences that put the relations of the
word tables into ordinary words, lists of words, and filler. A latent that fires on a task inside a prompt can
therefore also be looked at outside of one.

Everything is drawn from one `random.Random(seed)`: the same seed gives the same corpus on every machine.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from icl_lib.files.write import write_json
from icl_lib.tasks import Task, Template, load_tasks
from icl_lib.tasks.tables import WORDS, read_table

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS, UNK = range(4)

# One sentence per line; names in braces are columns of the table. Each relation is told in several ways.
TEMPLATES = {
    "countries": """
        the capital of {country} is {capital} .
        {capital} is the capital of {country} .
        {country} is a country in {continent} .
        {capital} is a city in {continent} .
        in {country} people speak {language} .
        most people in {capital} speak {language} .
        in {country} people pay with the {currency} .
        the {currency} is the money of {country} .
        she went from {capital} to see the rest of {country} .
        he learned {language} before he moved to {capital} in {country} .""",
    "people": """
        {person} was a {profession} from {country} .
        {person} worked as a {profession} .
        the {profession} {person} spoke {language} .
        {person} wrote letters in {language} .
        {person} was born in {country} .""",
    "nouns": """
        one {singular} , many {plural} .
        a single {singular} is less than two {plural} .
        the {singular} is a kind of {category} .
        {plural} belong to the group {category} .
        the Spanish word for {singular} is {spanish} .
        the French word for {singular} is {french} .
        the Italian word for {singular} is {italian} .
        in Spanish , {singular} is called {spanish} .
        in French , {singular} is called {french} .
        in Italian , {singular} is called {italian} .
        {spanish} means {singular} .
        {french} means {singular} .
        {italian} means {singular} .
        {spanish} is a word in Spanish .
        {french} is a word in French .
        {italian} is a word in Italian .""",
    "adjectives": """
        {word} is the opposite of {antonym} .
        it was not {word} but {antonym} .
        {word} and {antonym} .
        the Spanish word for {word} is {spanish} .
        the French word for {word} is {french} .
        the Italian word for {word} is {italian} .
        {spanish} means {word} .
        {french} means {word} .
        {italian} means {word} .""",
    "verbs": """
        today they {verb} , yesterday they {past} .
        they {past} last year and they {verb} again .
        they have often {participle} , and they {verb} today .
        to {verb} is good , and they like {gerund} .
        they {verb} every day , now they are {gerund} .
        they {past} once but have never {participle} .""",
    "items": """
        after {item} comes {next} .
        {next} follows {item} .
        before {next} comes {item} .
        {item} , {next} .
        {item} is a kind of {kind} .""",
}
FILLER = """
    the man and the woman walked along the street .
    it was a long day and nobody said a word .
    we saw the old house again , and then we went home .
    there is nothing new here today .
    she read a book about the world .
    they looked at the list and said nothing .
    this is what the people of the city said .
    he likes the morning more than the evening ."""


def _lines(block: str) -> list[str]:
    return [line.strip() for line in block.strip().splitlines()]


OTHER_SEPARATOR = " => "


class Language:
    """Generator of prompts and text. `tasks` are the embedded tasks; tables come from their word lists."""

    def __init__(self):
        self.tasks: dict[str, Task] = load_tasks("embedded")
        self.tables = {name: read_table(WORDS / f"{name}.tsv") for name in TEMPLATES}
        self.templates = {name: _lines(block) for name, block in TEMPLATES.items()}
        self.filler = _lines(FILLER)
        self.weights = [len(task.pairs) for task in self.tasks.values()]
        inputs = {name: {x for x, _ in task.pairs} for name, task in self.tasks.items()}
        self.neighbours = {n: [m for m in inputs if m != n and inputs[m] & inputs[n]] for n in inputs}

    def sentence(self, rng: random.Random) -> str:
        """One sentence: a relation in words (8 of 10), a list of words, or filler."""
        kind = rng.random()
        if kind < 0.8:
            table = rng.choice(list(TEMPLATES))
            return rng.choice(self.templates[table]).format(**rng.choice(self.tables[table]))
        if kind < 0.9:
            nouns = rng.sample(self.tables["nouns"], rng.randint(2, 5))
            return ", ".join(row["singular"] for row in nouns) + " ."
        return rng.choice(self.filler)

    def text(self, rng: random.Random, n_sentences: int) -> str:
        """Sentences one after the other, separated by blanks; now and then a new line."""
        joined = [self.sentence(rng) + ("\n" if rng.random() < 0.1 else " ") for _ in range(n_sentences)]
        return "".join(joined).strip()

    def pairs(self, name: str, rng: random.Random, n_pairs: int) -> list[tuple[str, str]]:
        """Different pairs of a task."""
        known = self.tasks[name].pairs
        return rng.sample(known, min(n_pairs, len(known)))

    def prompt(self, rng: random.Random, n_pairs: int, interleaved: float = 0.5) -> str:
        """Pairs of one task in the paper's template, or of two tasks that share inputs and are told apart by their
        arrows.

        A task is drawn in proportion to its number of pairs, so that an input by itself leaves all of its tasks equally
        likely. In an interleaved prompt only the arrow says which task comes: what to do has to be found out at the
        arrow, not at the input. One in four opens with `X -> Y`.
        """
        template = Template()
        name = rng.choices(list(self.tasks), weights=self.weights)[0]
        lines = [f"{x}{template.separator}{y}" for x, y in self.pairs(name, rng, n_pairs)]
        if rng.random() < interleaved:
            other = self.pairs(rng.choice(self.neighbours[name]), rng, n_pairs)
            lines = [
                f"{x}{OTHER_SEPARATOR}{y}" if rng.random() < 0.5 else line
                for line, (x, y) in zip(lines, other, strict=False)
            ]
        dummy = ["X -> Y"] if rng.random() < 0.25 else []
        return template.prefix + template.newline.join([*dummy, *lines])

    def vocabulary(self) -> list[str]:
        """Every token of the language, specials first, then sorted."""
        split = pre_tokenizer()
        prompts = (f"{x} -> {y}\n" for task in self.tasks.values() for x, y in task.pairs)
        rows = (
            line.format(**row) for name, table in self.tables.items() for row in table for line in self.templates[name]
        )
        words = {Template().prefix, "X -> Y =>", *self.filler, *prompts, *rows}
        tokens = {token for text in words for token, _ in split.pre_tokenize_str(text)}
        return SPECIALS + sorted(tokens)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts text into words, punctuation marks, `->` and line ends, and drops blanks."""
    blanks = pre_tokenizers.Split(Regex(" +"), "removed")
    marks = pre_tokenizers.Split(Regex(r"[-=]>|\n|[.,:]"), "isolated")
    return pre_tokenizers.Sequence([blanks, marks])


def build_tokenizer(language: Language) -> Tokenizer:
    """A word-level tokenizer over the language's vocabulary."""
    vocabulary = {token: i for i, token in enumerate(language.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path):
    """Write `tokenizer.json` and the `tokenizer_config.json` that names its special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    write_json(folder / "tokenizer_config.json", config)


def _rows(draw: Callable[[], str], tokenizer: Tokenizer, n_rows: int, seq: int) -> Iterator[list[int]]:
    for encoding in tokenizer.encode_batch([draw() for _ in range(n_rows)], add_special_tokens=False):
        ids = [BOS, *encoding.ids][:seq]
        yield ids + [PAD] * (seq - len(ids))


def corpus(
    language: Language, tokenizer: Tokenizer, *, n_rows: int, seq: int, seed: int, prompt_share: float = 0.6
) -> np.ndarray:
    """Tokens (n_rows, seq) int32, each row a prompt or a piece of text that starts with BOS; rows are shuffled."""
    rng = random.Random(seed)
    n_prompts = round(n_rows * prompt_share)
    # Each pair takes at least four tokens and each sentence at least three: these counts fill every row.
    prompts = _rows(lambda: language.prompt(rng, seq // 4), tokenizer, n_prompts, seq)
    texts = _rows(lambda: language.text(rng, seq // 4), tokenizer, n_rows - n_prompts, seq)
    rows = [*prompts, *texts]
    rng.shuffle(rows)
    return np.array(rows, np.int32)
