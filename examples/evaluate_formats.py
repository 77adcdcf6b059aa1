"""What each number format costs a small trained model, in bits per byte of text it has not seen.

Run: python examples/evaluate_formats.py [--tokens 16384]
"""

from __future__ import annotations

import argparse
import pathlib

import fp4moe

MODEL = pathlib.Path(__file__).resolve().parents[1] / "tests" / "data" / "small_gemma4"


def main() -> None:
    """Evaluate; few tokens by default, so that the standard errors are large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    parser.add_argument("--format", nargs="+", default=["nvfp4", "fp8", "mxfp4"])
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    report = fp4moe.evaluate(
        options.model, format=options.format, tokens=options.tokens, length=256, batch=8
    )
    print(report)


if __name__ == "__main__":
    main()
