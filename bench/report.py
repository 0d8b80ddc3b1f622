"""Tables and charts from bench/results/*.json: `python bench/report.py [--check]`.

Writes a full table beside each JSON, the tables between the markers of README.md, and the charts in docs/figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import chart
from full_tables import render_full, render_index
from headlines import render_gpu, render_readme
from records import load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("bench", "results")
README = Path("README.md")
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
GPU_BEGIN, GPU_END = "<!-- gpu figures -->", "<!-- /gpu figures -->"


def generated(root: Path) -> dict[Path, str]:
    """Every file that follows from the results in `root`, by its path within `root`."""
    results = load(root / RESULTS)
    tables = {RESULTS / f"{name}.md": render_full(record) for name, record in results.items()}
    charts = {Path("docs", "figures", f"headline-{theme}.svg"): chart.render(results, theme) for theme in chart.THEMES}
    readme = replace_block((root / README).read_text(encoding="utf-8"), render_readme(results), README, (BEGIN, END))
    gpu = render_gpu(results)
    if gpu or GPU_BEGIN in readme:  # a README without a figure of a GPU needs no markers
        readme = replace_block(readme, gpu, README, (GPU_BEGIN, GPU_END))
    return {
        README: readme,
        RESULTS / "README.md": render_index(results),
        **tables,
        **charts,
    }


def replace_block(text: str, block: str, name: Path, markers: tuple[str, str]) -> str:
    """`text` with `block` between its markers; raises ValueError unless it has each marker once."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{name} must hold the lines {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}{end}{rest.split(end)[1]}"


def refresh(root: Path = ROOT, *, write: bool) -> list[str]:
    """The files that differ from what the results give; with `write` they are written."""
    stale = []
    for path, fresh in generated(root).items():
        target = root / path
        if not _is_fresh(target, fresh):
            stale.append(path.as_posix())
            if write:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(fresh, encoding="utf-8")
    return stale


def _is_fresh(target, fresh):
    if not target.exists():
        return False
    found = target.read_text(encoding="utf-8")
    return chart.is_same(found, fresh) if target.suffix == ".svg" else found == fresh


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check = parser.parse_args().check
    stale = refresh(write=not check)
    for name in stale:
        print(f"{name} {'is stale: run python bench/report.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
