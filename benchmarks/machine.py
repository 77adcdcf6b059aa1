"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import platform


def cpu_name() -> str:
    """The model name that the kernel reports, or what the platform module knows."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
