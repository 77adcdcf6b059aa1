"""Several processes with Gloo, started without a launcher, which would import torch once more."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap

SUPPORT = str(pathlib.Path(__file__).parent)


def start(script, count, *arguments):
    """Start `count` processes of a script; their stdout and stderr go to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "run.py").write_text(textwrap.dedent(script))
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": SUPPORT}
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"{rank}", "w") as log:
            command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | shared | own
            )
        process.log = folder / f"{rank}"
        processes.append(process)
    return processes


def run(script, count, *arguments, timeout=300):
    """Run the script in `count` processes; returns what each printed. All must succeed."""
    processes = start(script, count, *arguments)
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = [process.log.read_text() for process in processes]
    assert not any(codes), "\n".join(text[-4000:] for text in printed)
    return printed
