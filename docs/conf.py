"""How the pages of this folder become a site: `make docs`."""

import re
from typing import Any

import ckpt

project = "lazyckpt"
copyright = "the authors of lazyckpt, Apache-2.0"
version = release = ckpt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "lazyckpt"
html_static_path = ["_static"]
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

add_module_names = False
autodoc_inherit_docstrings = False  # those of torch and of frameworks are not ours
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that has a docstring of its own would stand there twice else
python_maximum_signature_line_length = 100

# ---- docstrings ------------------------------------------------------------------------------------------------------

_CODE = re.compile(r"`([^`]+)`")
_OWN_NAME = re.compile(r"(ckpt(?:\.\w+)+)(\(\))?")
# What Sphinx would take for markup; but `*a word*`, in a group, is meant so.
_MARKUP = re.compile(r"(\*\w[^*\"\n]*\w\*)|(?<!\*)\*(?![* \n])|\||(?<=\w)_(?=\W|$)")


def to_restructured(lines: list[str]) -> list[str]:
    """Docstrings are plain text with code between backticks, and indented examples: this is what Sphinx takes it for.

    Behind what ends a paragraph at the margin, an indented block is an example. Elsewhere a star is a star.
    """
    found: list[str] = []
    in_example = False
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        if in_example and line and not indented:
            in_example = False
        if indented and not in_example and number > 0 and not lines[number - 1]:
            before = next((each for each in reversed(lines[:number]) if each), "")
            if not before.startswith(" "):
                in_example = True
                found += ["::", ""]
        found.append(f"\0{line}" if in_example else line)
    return _escape("\n".join(found)).split("\n")


def _escape(text: str) -> str:
    """Of what is no example, which is marked by a zero at the begin of the line."""
    parts = re.split(r"((?:^\0[^\n]*\n?)+)", text, flags=re.MULTILINE)
    return "".join(part.replace("\0", "") if part.startswith("\0") else _escape_text(part) for part in parts)


def _escape_text(text: str) -> str:
    escaped, at = "", 0
    for code in _CODE.finditer(text):
        escaped += _without_markup(text[at : code.start()]) + _as_code(re.sub(r"\s+", " ", code[1]))
        if re.match(r"\w", text[code.end() :]):
            escaped += "\\ "
        at = code.end()
    return escaped + _without_markup(text[at:])


def _without_markup(text: str) -> str:
    return _MARKUP.sub(lambda found: found[1] or f"\\{found[0]}", text)


def _as_code(text: str) -> str:
    own = _OWN_NAME.fullmatch(text)
    return f"``{text}``" if own is None else f":py:obj:`{text} <{own[1]}>`"


def convert(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_restructured(lines)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", convert, priority=400)  # before napoleon
