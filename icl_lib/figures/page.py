"""How a notebook shows a figure and a sentence: sharp, numbered, and with words for those who cannot see it."""

import io

import matplotlib.pyplot as plt
from IPython.display import Image, Markdown, display
from PIL import Image as Picture

_DPI = 160  # two pixels of the file for one of the page: sharp on screens of high density
_COLOURS = 256  # of the palette: a third of the bytes; chosen to cover the rare colours, too, none is off by 10 of 255


def show(number: int, caption: str) -> None:
    """Show the current figure with "**Figure `number`.** `caption`" below it, and close it.

    The caption says what to look at and what it means, in whole sentences of Markdown; its text without markup is the
    picture's alternative text. Figures of a notebook are numbered from 1 in their order. Raises `ValueError` if no
    figure is open.
    """
    if not plt.get_fignums():
        raise ValueError(f"figure {number} has not been drawn: call a drawing function before figures.show")
    png = io.BytesIO()
    plt.gcf().savefig(png, format="png", dpi=_DPI, bbox_inches="tight")
    plt.close()
    drawing = (
        Picture.open(png)
        .convert("RGB")
        .quantize(_COLOURS, method=Picture.Quantize.MAXCOVERAGE, dither=Picture.Dither.NONE)
    )
    packed = io.BytesIO()
    drawing.save(packed, format="png", optimize=True)
    words = f"Figure {number}. {caption}".translate(str.maketrans("", "", "*`$")).replace("\n", " ")
    display(Image(packed.getvalue(), width=drawing.width // 2, alt=words))
    say(f"**Figure {number}.** {caption}")


def say(text: str) -> None:
    """Display a sentence that is made from values, as Markdown: it is true of whatever model the notebook ran on."""
    display(Markdown(text))
