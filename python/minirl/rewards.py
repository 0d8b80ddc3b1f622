"""Rewards of whole responses, and the parsing of reference answers. A cut-off response is graded as it is."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache

from math_verify import parse, verify


def exact_match(answer: str, response: str) -> float:
    """1 if the response is the answer, character by character, else 0."""
    return float(response == answer)


@dataclass(frozen=True)
class ReferenceAnswer:
    r"""A reference answer, and the reward of a response to its problem.

    text: the normalised answer. value: the answer as parsed by math-verify; None for a text answer, which is a word, a
    name or a choice letter (see `read_answer`).

    The final answer of a response is the content of the last \boxed{…}. Without a box, it is the rest of the line after
    the last "answer is" or "answer:". Without these, it is the last line.

    A response has the reward 1 in these cases:
        the normalised final answer equals `text`;
        for a text answer: the first sentence of the final answer equals it, or the choice letter before an option, as
        in "(B) Paris";
        for mathematics: math-verify finds the response equal to `value`.
    """

    text: str
    value: list | None

    def reward(self, response: str) -> float:
        """1 for a right response, else 0."""
        final = final_answer(response)
        if normalised(final) == self.text:
            return 1.0
        if self.value is None:
            return float(self.text in (normalised(_first_sentence(final)), _chosen_letter(final)))
        return float(verify(self.value, parse(response)))


@cache
def read_answer(answer: str) -> ReferenceAnswer:
    r"""Parse a reference answer.

    Words, names, single letters and the content of \text{…} are text answers. Other answers are mathematics for
    math-verify; LaTeX needs no dollar signs. A number followed by one word is a number with its unit.
    Raises ValueError for an empty answer, and for an answer that is neither text nor mathematics.
    """
    text = normalised(answer)
    if not any(character.isalnum() for character in text):
        raise ValueError(_MUST_BE)
    if _EXPLICIT_TEXT.fullmatch(answer.strip().strip("$")):
        return ReferenceAnswer(text, None)
    if "\\" not in answer and (names := {word.casefold() for word in _LETTERS.findall(answer)}) and names <= _FUNCTIONS:
        raise ValueError(rf"{_MUST_BE}; math-verify reads {min(names)} as letters, and \{min(names)} as the function")
    value = _mathematics(_as_latex(answer))
    if _is_words(text) and (value is None or value[0].free_symbols):
        with_unit = _NUMBER_AND_UNIT.fullmatch(answer.strip())
        return ReferenceAnswer(text, None if with_unit is None else _mathematics(with_unit["number"]))
    if value is None or not verify(value[0], value[0]):
        raise ValueError(_MUST_BE)
    return ReferenceAnswer(text, value)


def final_answer(response: str) -> str:
    """The part of a response with its final answer (see ReferenceAnswer), with its marks and spaces."""
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    announced = list(_ANNOUNCEMENT.finditer(response))
    if announced:
        return response[announced[-1].end() :].partition("\n")[0]
    return next((line for line in reversed(response.splitlines()) if line.strip()), "")


def normalised(text: str) -> str:
    r"""The text in lower case with single spaces, without enclosing marks and without punctuation at its end.

    Marks are quotes, Markdown's stars, underscores and backticks, dollar signs, \boxed{…}, \text{…} and similar
    commands, and the parentheses around a single letter.
    """
    text = unicodedata.normalize("NFC", text).casefold()
    bare = " ".join(text.split())
    while True:
        wrapped = _WRAPPED.fullmatch(bare)
        inner = bare.rstrip(".,;: ") if wrapped is None else wrapped[wrapped.lastgroup].strip()
        if inner == bare:
            return bare
        bare = inner


_MUST_BE = r"it must be mathematics that math-verify can read, in LaTeX, or text, which \text{…} marks as such"
_EXPLICIT_TEXT = re.compile(r"\\text\w*\s*\{[^{}]+\}")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
# math-verify reads these as products of letters unless a backslash stands before them
_FUNCTIONS = {"sqrt", "cbrt", "frac", "log", "ln", "exp", "pi", "infty", "infinity"} | {
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
}
_NUMBER_AND_UNIT = re.compile(r"(?P<number>[-+]?[\d.,]*\d)\s*[^\W\d_]{2,}\.?")
_MIXED_NUMBER = re.compile(r"(\d+)\s+(\d+)/(\d+)")
_ANNOUNCEMENT = re.compile(r"\banswer\b(?:\*\*|__)?\s*(?:is\b\s*:?|:)(?:\*\*|__)?\s*", re.IGNORECASE)
_WRAPPED = re.compile(
    r"(?P<mark>\*{1,3}|_{1,2}|`|\"|'|\${1,2})(?P<marked>.+)(?P=mark)"
    r"|[“‘](?P<quoted>.+)[”’]"
    r"|\\(?:boxed|fbox|text\w*|math(?:rm|bf|it|sf|tt)|operatorname|emph)\s*\{(?P<styled>[^{}]+)\}"
    r"|\\\((?P<inline>.+)\\\)|\\\[(?P<display>.+)\\\]"
    r"|\(?(?P<letter>[^\W\d_])\)"
)
_CHOICE = re.compile(r"\s*(?:\((?P<enclosed>[^\W\d_])\)|(?P<bare>[^\W\d_])[).:])(?=\s|$)")
_STYLE = re.compile(r"\\(?:text|math)\w*|[{}*$]")


def _mathematics(text: str) -> list | None:
    """The result of math-verify's parser, an expression first; None if it finds no expression."""
    # Without dollar signs, math-verify reads plain numbers only, and 3\sqrt{2} would be 3.
    parsed = parse(text if "$" in text or "\\boxed" in text else f"${text}$")
    return parsed if parsed and not isinstance(parsed[0], str) else None


def _as_latex(answer: str) -> str:
    """Rewrites numbers that math-verify misreads as LaTeX: 1e-5 and 1 1/2."""
    try:
        number = Decimal(answer)
    except InvalidOperation:
        return _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", answer)
    if not number.is_finite():
        return answer
    if abs(number.adjusted()) >= 1000:
        raise ValueError("its exponent must be below 1000")
    return f"{number:f}"


def _is_words(text: str) -> bool:
    """Whether a text is a single letter, or words with numbers and punctuation between them, but no formula."""
    kinds = "".join(map(_kind, text))
    words = re.fullmatch(r"[ .]*(?:a+|0+)(?:-a+)*(?:[ .]+(?:a+|0+)(?:-a+)*)*[ .]*", kinds)
    return words is not None and ("aa" in kinds or re.sub(r"[ .]", "", kinds) == "a")


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LM":
        return "a"
    if category == "Nd":
        return "0"
    if character.isspace() or character in "-'’":
        return " " if character.isspace() else "-"
    return "." if category[0] == "P" and character not in "\\{}[]_*/%#@" else "x"


def _last_boxed(response: str) -> str | None:
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if not depth:
            return response[start:end]
    return None  # cut off


def _first_sentence(text: str) -> str:
    return re.split(r"[.!?](?:\s|$)", text.strip(), maxsplit=1)[0]


def _chosen_letter(text: str) -> str | None:
    match = _CHOICE.match(_STYLE.sub("", text).replace("\\ ", " "))
    return None if match is None else match[match.lastgroup].casefold()
