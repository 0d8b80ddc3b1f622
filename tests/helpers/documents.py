"""What the documents show, for tests that run it: blocks of code, and lines that call a command."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"(<!-- (?:fragment|command): [^\n]*-->\n)?```(\w+)\n(.*?)```", flags=re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """Those of a language that are not marked as fragments, or as commands that install, in order."""
    found = _BLOCK.findall(path.read_text(encoding="utf-8"))
    return [text for fragment, kind, text in found if kind == language and not fragment]


def loss_blocks() -> list[str]:
    """The python blocks of the README, those of docs/losses.md after them, and the first of docs/batch_invariance.md.

    Each continues with the names of those before it.
    """
    same_bits = blocks(ROOT / "docs" / "batch_invariance.md", "python")[0]
    return [*blocks(README, "python"), *blocks(ROOT / "docs" / "losses.md", "python"), same_bits]


def commands(path: Path, name: str) -> list[str]:
    """The lines that begin with a command's name, indented or in a block, without their comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if re.match(rf"(    )?{name} ", line)]
