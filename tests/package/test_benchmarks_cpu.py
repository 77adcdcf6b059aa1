"""benchmarks/bench_cpu.py runs with small layers, and prints no time of a wrong result."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_it_checks_and_then_times():
    command = [sys.executable, str(FOLDER / "bench_cpu.py"), "--small", "--turns", "1"]
    command += ["--shape", "gemma4", "nano", "--tokens", "1", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    named = [f"{name} nvfp4 T = {t}: ratio " for name in ("gemma4", "nano") for t in (1, 5)]
    assert len(lines) == 4 and all(map(str.startswith, lines, named))
    # A limit that nothing keeps: as a wrong result would be met.
    code = "import bench_cpu, sys; bench_cpu.LIMIT = 0; sys.exit(bench_cpu.main())"
    command = [sys.executable, "-c", code, "--small", "--turns", "1", "--tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 1 and "wrong, errors" in done.stdout and "ratio" not in done.stdout
