"""Check that the prose of the README and of every page can be read: Flesch at least 50.

    python docs/scripts/readability.py [FILE ...]

The Flesch reading ease counts words a sentence and syllables a word; 50 is the border between
"fairly difficult" and "difficult". Code, tables, headings and links' addresses are no prose, and a
name in code counts as one short word: nobody reads `flashinfer_trtllm` syllable by syllable.
"""

from __future__ import annotations

import pathlib
import re
import sys

import textstat

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEAST = 50.0
NO_PROSE = ("#", "|", ":::", "!!!", "    options", "      heading", "      members")


def prose(markdown: str) -> str:
    """Return the sentences of a page; an item of a list and a paragraph end one."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    lines = ["" if line.startswith(NO_PROSE) else line for line in text.splitlines()]
    text = "\n".join(lines)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[*-]|\d+\.) ", "\n" + text)
    joined = [" ".join(p.split()).strip("*- ") for p in paragraphs]
    return "\n".join(p if p[-1] in ".!?" else f"{p.rstrip(':;,')}." for p in joined if p)


def main(files: list[str]) -> int:
    """Print the score of each file; 1 where one is below LEAST."""
    paths = [pathlib.Path(f) for f in files] or [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    failed = False
    for path in sorted(paths):
        text = prose(path.read_text("utf-8"))
        words = len(text.split())
        score = textstat.flesch_reading_ease(text) if words > 40 else 100.0
        failed |= score < LEAST
        print(f"{score:6.1f}  {words:5d} words  {path.name}{'  too hard' * (score < LEAST)}")
        if score < LEAST:
            # The sentences that cost most, to begin with.
            sentences = re.split(r"(?<=[.!?])\s+", text)
            for one in sorted(sentences, key=textstat.flesch_reading_ease)[:5]:
                print(f"        {textstat.flesch_reading_ease(one):6.1f}  {one[:110]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
