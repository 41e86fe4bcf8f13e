"""Docstrings (reStructuredText with Google's sections) and formulas (TeX) as the site shows them."""

import html
import inspect
import re
from xml.etree import ElementTree

SECTIONS = re.compile(r"^(Source|Differs|Args|Raises|Returns|Example|Yields):$", re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring's text as Markdown: roles become code, formulas ``$...$``, literal blocks and tables stay."""
    text = re.sub(r"^( *)\.\. math::[ ]*((?:.+\n?)(?:\1[ ]+.*\n?)*)", _display, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", lambda found: f"${' '.join(found[1].split())}$", text)
    text = re.sub(r":(?:class|meth|func|attr|mod|data):`~?([^`]*)`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # as griffe knows it
    text = re.sub(r"::\n\n(?=    )", ":\n\n", text)
    return re.sub(r"^( *)=+ +=+\n((?:\1.*\n)+?)\1=+ +=+$", _table, text, flags=re.MULTILINE)


def mathml(page: str) -> str:
    """The formulas of an HTML page as MathML, which browsers show without a script."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    display = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
    page = inline.sub(lambda found: _formula(found[1], "inline"), page)
    return display.sub(lambda found: f'<div class="formula">{_formula(found[1], "block")}</div>', page)


def paragraphs(value: object) -> list[str]:
    """The description in a docstring: what stands between its first line and its first section, by paragraph."""
    text = (inspect.getdoc(value) or "").partition("\n")[2]
    return [part for part in SECTIONS.split(text)[0].split("\n\n") if part.strip()] + _memory(text)


def _memory(text: str) -> list[str]:
    """Paragraphs between the sections, which say what it costs."""
    return [part.strip("\n") for part in text.split("\n\n") if re.match(r"\n?(Memory|Cost|Time): ", part)]


def _display(found: re.Match[str]) -> str:
    formula = " ".join(found[2].split())
    return f"{found[1]}$$\n{found[1]}{formula}\n{found[1]}$$\n"


def _table(found: re.Match[str]) -> str:
    rows = [re.split(r"  +", row.strip(), maxsplit=1) for row in found[2].splitlines()]
    lines = ["| | |", "|---|---|", *(f"| {first} | {second} |" for first, second in rows)]
    return "\n".join(f"{found[1]}{line}" for line in lines)


def _formula(tex: str, display: str) -> str:
    from latex2mathml.converter import convert  # of the extra `docs`; the rest is needed without it

    tex = html.unescape(tex).strip()
    tex = re.sub(r"\\bigl|\\bigr|\\Bigl|\\Bigr|\\Big(?=[^l-r])|\\big(?=[^l-r])", "", tex)  # sizes are the browser's
    tex = tex.replace(r"\tfrac", r"\frac").replace(r"\textstyle", "")
    # What would stand in the formula as it is, as LaTeX takes it: text with a subscript's mark in it.
    tex = re.sub(r"\\text\{([^}]*)\}", lambda found: r"\text{" + found[1].replace(r"\_", "_") + "}", tex)
    made = convert(tex, display=display)
    ElementTree.fromstring(made)  # a formula that is no XML would break the page
    return made
