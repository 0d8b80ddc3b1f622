"""Docstrings of this house as Markdown, for mkdocs.yml: each `name: text` becomes an entry of a list."""

import re

import griffe

# names, then a colon and a text: "clip_ratio_low, clip_ratio_high: the bounds of r"
_ENTRY = re.compile(r"^(?P<names>[\w`]+(, [\w`]+)*): (?P<text>.*)")
_LAST = re.compile(r"^(Raises|Returns|Yields)\b")
_SPECIAL = re.compile(r"`[^`]*`|[*_\[\]]|<")


class Lists(griffe.Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """`text` with a list entry for each described name. Characters that Markdown would read are escaped."""
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
    """Code between backticks stays as it is."""

    def escape(found: re.Match) -> str:
        return {"`": found[0], "<": "&lt;"}.get(found[0][0], "\\" + found[0])

    return _SPECIAL.sub(escape, text)
