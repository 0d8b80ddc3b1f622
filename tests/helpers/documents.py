"""Contents of the documents, for tests that run them: blocks of code, and lines that call a command."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"(<!-- (?:fragment|command): [^\n]*-->\n)?```(\w+)\n(.*?)```", flags=re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of a language in order, without blocks marked as fragments or as install commands."""
    found = _BLOCK.findall(path.read_text(encoding="utf-8"))
    return [text for fragment, kind, text in found if kind == language and not fragment]


def loss_blocks() -> list[str]:
    """The python blocks of the README and docs/losses.md, then the first block of docs/batch_invariance.md.

    A block uses the names that the earlier blocks define.
    """
    same_bits = blocks(ROOT / "docs" / "batch_invariance.md", "python")[0]
    return [*blocks(README, "python"), *blocks(ROOT / "docs" / "losses.md", "python"), same_bits]


def commands(path: Path, name: str) -> list[str]:
    """The lines that begin with a command's name, without comments; they may be indented or in a block."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if re.match(rf"(    )?{name} ", line)]
