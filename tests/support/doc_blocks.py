"""Code blocks of Markdown files, and what stands in them for models of the reader."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
SUPPORT = "|".join(file.stem for file in (ROOT / "tests" / "support").glob("*.py"))
HUB_MODEL = "google/gemma-4-26B-A4B-it"


class Block(NamedTuple):
    """A fenced block: its language, its code, its first line in the file, why it is not run."""

    language: str
    code: str
    line: int
    not_run: str


def blocks(page: pathlib.Path, language: str | None = None) -> list[Block]:
    """Return the blocks of a page; `<!-- not run here: why -->` before one keeps it out."""
    text = page.read_text("utf-8")
    pattern = r"(?:<!-- not run here: ([^>]*) -->\n)?^```(\w+)\n(.*?)^```"
    found = [
        Block(m[2], m[3], text[: m.start(3)].count("\n") + 1, m[1] or "")
        for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]
    assert text.count("```") == 2 * len(found), f"{page.name}: a block without a language"
    return [block for block in found if language in (None, block.language)]


def commands(page: pathlib.Path) -> list[str]:
    """Return the lines of the bash blocks, without comments."""
    lines = "\n".join(block.code for block in blocks(page, "bash")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def run_page(page: pathlib.Path, paths: dict[str, pathlib.Path]) -> dict:
    """Execute the python blocks of a page in turn, in one namespace; return it.

    Args:
        paths: what a reader would write, to what it is here.
    """
    names: dict = {"__name__": "page"}
    for block in blocks(page, "python"):
        if block.not_run:
            continue
        code = block.code
        # The longest first: one name may begin another.
        for name in sorted(paths, key=len, reverse=True):
            code = re.sub(rf'"{re.escape(name)}"', repr(str(paths[name])), code)
        assert "path/to" not in code and HUB_MODEL not in code, (page.name, block.line)
        # A reader does not have the tests on the path.
        assert not re.search(rf"^(from|import) ({SUPPORT})\b", code, re.MULTILINE), page.name
        # Errors show the line of the page.
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
    return names
