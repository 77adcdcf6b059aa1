"""Processes with Gloo for tests: see parallel_checks.py."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

CHECKS = str(pathlib.Path(__file__).parent / "parallel_checks.py")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(runs, folder, timeout=900):
    """Run, one after the other, (number of processes, {check: arguments}); returns what they print.

    Whatever has not ended by then is killed.
    """
    described = []
    for number, (count, checks) in enumerate(runs):
        logs = [str(folder / f"run{number}_process{rank}.log") for rank in range(count)]
        described.append({"port": free_port(), "logs": logs, "checks": checks})
    file = folder / "runs.json"
    file.write_text(json.dumps(described, default=str))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, CHECKS, str(file)]
    launched = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        launched.wait(timeout)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
    return [[pathlib.Path(log).read_text() for log in run["logs"]] for run in described]
