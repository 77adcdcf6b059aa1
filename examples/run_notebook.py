"""Run the cells of rewrite.ipynb in turn, without Jupyter; --save stores what they print.

Run: python examples/run_notebook.py [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib

NOTEBOOK = pathlib.Path(__file__).resolve().parent / "rewrite.ipynb"


def main() -> None:
    """Execute every code cell in one namespace, and print what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="store the outputs in the notebook")
    save = parser.parse_args().save
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        text = printed.getvalue()
        print(text, end="")
        lines = text.splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": lines}
        cell["outputs"] = [stream] if lines else []
    if save:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
