"""examples/two_processes.py runs and agrees with one process."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "two_processes.py"


@pytest.mark.slow
def test_all_ways_agree_with_one_process():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "All ways agree with one process within 1e-06." in done.stdout
    rows = re.findall(r"^(\w[\w ]+?)  .*?([\d.]+) kB$", done.stdout, re.MULTILINE)
    assert dict(rows) == {
        "one process": "885",
        **dict.fromkeys(("tensor parallel", "expert parallel", "a batch for each"), "443"),
    }
