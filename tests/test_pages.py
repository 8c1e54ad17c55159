"""The notebooks as pages: figures with numbers and words, and prose whose numbers are true of the run at hand."""

import re

import jax.numpy as jnp
import matplotlib.pyplot as plt
import nbformat
import pytest

from icl_lib import figures
from icl_lib.cards.card import check_card, notebook_files
from icl_lib.cards.notebook import page_for
from icl_lib.commands import front_page
from icl_lib.embedded import CATALOGUE
from icl_lib.embedded.catalogue import own_entry
from icl_lib.files.paths import root

each_notebook = pytest.mark.parametrize("path", notebook_files(), ids=lambda p: p.stem)
# What may stand in prose that is shown on every model: formulas, code, links, places in papers, years, other notebooks
_REFERENCE = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)?\$|`[^`]*`|\[[^\]]*\]\([^)]*\)|^ {4}.*$|"
    r"\b(?:Figs?|Tables?|Secs?|App|Eqs?|[Nn]otebooks?|Algorithm|Appendix|v)\b\.?\s*[\dA-Z][\w.]*"
    r"(?:(?:,| and| to|, and)\s+[\dA-Z][\w.]*)*|\((?:19|20)\d\d\w?\)|"
    r"\b(?:19|20)\d\d\b|[A-Z][\w]*-\d+(?:\.\d+)?\w*|\bL[012]\b|\b(?:ITO|[Tt]op[Kk])\(\d+\)",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?%)?")


def _read(path):
    return nbformat.read(path, as_version=4)


def _tags(cell):
    return set(cell.metadata.get("tags", []))


def _prose(path, tagged):
    """Markdown cells that belong to one model (`tagged`), or to all."""
    cells = [c for c in _read(path).cells if c.cell_type == "markdown"]
    return [c.source for c in cells if bool(_tags(c) & set(CATALOGUE)) == tagged]


def _numbers(text):
    """Numbers outside of formulas, code, links and references."""
    return [match.group().strip() for match in _NUMBER.finditer(_REFERENCE.sub(" ", text))]


def _published(text):
    """The text without the sentences, or the parentheses, that give the paper's numbers: they are true on any model."""
    text = re.sub(r"\([^()]*\b(?:paper|published|authors?)\b[^()]*\)", " ", text)
    sentences = re.split(r"(?<=[.:;?!])\s+|\n[-*] |\n\n", text)
    return " ".join(s for s in sentences if not re.search(r"\b(?:[Pp]aper|[Pp]ublished|[Aa]uthors?|bar)\b", s))


def _small(number):
    """Counting words in figures (0 to 9, without decimals or per cent) carry no result."""
    return re.fullmatch(r"[+-]?\d", number) is not None


@each_notebook
def test_prose_for_every_model_states_no_result(path):
    """A number of one model stands in a cell tagged with its name, or comes out of a code cell."""
    found = {
        source: [n for n in _numbers(_published(source)) if not _small(n)] for source in _prose(path, tagged=False)
    }
    assert {source: numbers for source, numbers in found.items() if numbers} == {}


def _text_of(output):
    data = output.get("data", {})
    return " ".join(
        [output.get("text", ""), *(str(data.get(kind, "")) for kind in ("text/plain", "text/html", "text/markdown"))]
    )


def _values(text):
    """The numbers of outputs, as floats, those of HTML without its style sheets."""
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL).replace(",", "").replace("−", "-")
    return [float(n) for n in re.findall(r"(?<![\w#])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


def _backed(number, values):
    """Whether an output rounds to the number, as it is or as a share of one."""
    bare = number.rstrip("% ").replace(",", "")
    half = 0.501 * 10.0 ** -len(bare.partition(".")[2])
    wanted = abs(float(bare))
    return any(abs(abs(v) * unit - wanted) <= half for v in values for unit in (1.0, 100.0))


@each_notebook
def test_numbers_in_prose_about_one_model_are_those_of_its_outputs(path):
    """Decimals and percentages, to the digits that are written: such prose cannot go stale unseen."""
    notebook = _read(path)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    parameters = " ".join(c.source for c in notebook.cells if "parameters" in _tags(c))
    values = _values(" ".join([parameters, *map(_text_of, outputs)]))
    stated = [n for source in _prose(path, tagged=True) for n in _numbers(_published(source)) if re.search(r"[.%]", n)]
    assert [n for n in stated if not _backed(n, values)] == []


@each_notebook
def test_another_card_leaves_out_what_is_said_of_one_model(path):
    other = check_card(root() / "params" / "gemma-1-2b.yaml").model_dump()
    page = page_for(_read(path), other)
    own = _prose(path, tagged=True)
    assert own and not {c.source for c in page.cells} & set(own)
    changed = page_for(_read(path), check_card(root() / "params" / "tiny.yaml").model_dump() | {"n_shots": 5})
    assert not {c.source for c in changed.cells} & set(own), "other settings are another experiment"
    same = page_for(_read(path), check_card(root() / "params" / "tiny.yaml").model_dump() | {"run_dir": "runs/mine"})
    assert same == _read(path)


def test_only_its_own_card_owns_an_entry():
    card = check_card(root() / "params" / "tiny.yaml").model_dump()
    assert own_entry(card) == "icl-tiny" and own_entry({"model": "icl-tiny", "n_shots": card["n_shots"]}) == "icl-tiny"
    assert own_entry(card | {"seed": 1}) == "" and own_entry(card | {"model": "google/gemma-2b"}) == ""


@each_notebook
def test_figures_are_numbered_and_have_words(path):
    """Each picture is followed by its caption, numbers run from 1, and the caption is the alternative text."""
    numbers, pictures = [], 0
    for cell in _read(path).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                pictures += 1
                assert len(output.metadata["image/png"]["alt"]) > 40, cell.source
            found = re.match(r"\*\*Figure (\d+)\.\*\* ", str(output.get("data", {}).get("text/markdown", "")))
            numbers += [int(found.group(1))] if found else []
    assert numbers == list(range(1, pictures + 1))


@each_notebook
def test_mathematics_has_no_doubled_backslash(path):
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", "\n".join(_prose(path, False) + _prose(path, True)), re.DOTALL)
    assert [f for f in formulas if re.search(r"\\\\[A-Za-z]", f)] == []


def test_show_gives_a_sharp_picture_with_words_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr("icl_lib.figures.page.display", shown.append)
    fig, _ = plt.subplots(figsize=(4, 2))
    fig.axes[0].plot(jnp.arange(3))
    figures.show(3, "The line *rises*: $x$ grows with the index.")
    picture, caption = shown
    assert caption.data == "**Figure 3.** The line *rises*: $x$ grows with the index."
    assert picture.alt == "Figure 3. The line rises: x grows with the index." and 500 < 2 * picture.width < 700
    assert picture.data[:4] == b"\x89PNG" and not plt.get_fignums()
    with pytest.raises(ValueError, match="figure 4 has not been drawn"):
        figures.show(4, "Nothing.")


def test_the_pictures_of_the_front_page_are_those_of_the_notebooks():
    """Renewed by `python -m icl_lib.commands.front_page`."""
    here = {path.stem: path.read_bytes() for path in (root() / "assets" / "figures").glob("*.png")}
    assert here == front_page.pictures() and len(here) == 3
