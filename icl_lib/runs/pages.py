"""Notebooks as HTML pages that need no network: formulas are MathML, which browsers draw themselves, and no page loads
a script.
"""

from html import escape
from pathlib import Path
from typing import Any

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

# nbconvert's page without what it fetches from elsewhere: require.js, MathJax, Mermaid, the widget manager
_TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}{% block jupyter_widgets %}{% endblock %}
{% block html_head_css %}<style>
math { font-size: 1.1em; } math[display="block"] { margin: 1em 0; }</style>{% endblock %}
"""


def mathml(tex: str, display: str) -> str:
    """A formula as MathML (`display` is "inline" or "block"); one that cannot be converted stays as its LaTeX."""
    try:
        formula = convert(tex, display=display)
    except Exception:  # the converter has no common base class; one odd formula should not cost the report
        formula = "\\"
    # the converter passes commands that it does not know through as text
    return f'<code class="latex">{escape(tex)}</code>' if "\\" in formula else formula


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """nbconvert's filter, with formulas as MathML."""
        attachments = context.get("cell", {}).get("attachments", {})
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        renderer = _Renderer(escape=False, embed_images=self.embed_images, attachments=attachments, path=path)
        return MarkdownWithMath(renderer=renderer).render(source)


def page_of(notebook: Path) -> str:
    """The page of a notebook, figures embedded."""
    exporter = _Exporter(
        raw_template=_TEMPLATE, embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    return exporter.from_filename(str(notebook))[0]
