"""An extension of griffe for mkdocs.yml: turns docstrings into Markdown. Each `name: text` becomes a list entry."""

import re

import griffe

# one or more names, a colon and a text, as in "clip_ratio_low, clip_ratio_high: the bounds of r"
_ENTRY = re.compile(r"^(?P<names>[\w`]+(, [\w`]+)*): (?P<text>.*)")
_LAST = re.compile(r"^(Raises|Returns|Yields)\b")
_SPECIAL = re.compile(r"`[^`]*`|[*_\[\]]|<")


class Lists(griffe.Extension):
    """Rewrites the docstring of every object that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """`text` with a list entry for each described name, and with the special characters of Markdown escaped."""
    first, *lines = text.splitlines()
    written, in_list = [_escaped(first)], False
    for line in lines:
        entry = _ENTRY.match(line)
        if entry or _LAST.match(line):
            names = f"**{_escaped(entry['names'])}**: " if entry else ""
            written += ["", f"- {names}{_escaped(entry['text'] if entry else line)}"]
            in_list = True
        elif in_list and line.startswith(" "):
            written.append("    " + _escaped(line.strip()))
        else:
            written += [""] * in_list + [line if line.startswith("    ") else _escaped(line)]
            in_list = False
    return "\n".join(written)


def _escaped(text: str) -> str:
    """`text` with the special characters of Markdown escaped, but not between backticks."""

    def escape(found: re.Match) -> str:
        return {"`": found[0], "<": "&lt;"}.get(found[0][0], "\\" + found[0])

    return _SPECIAL.sub(escape, text)
