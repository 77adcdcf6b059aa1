"""Find the TRT-LLM-Gen kernels in the wheel of flashinfer-cubin and disassemble them.

`make cubins` downloads the wheel. nvdisasm comes with Triton.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import zipfile
from pathlib import Path

__all__ = ["VERSION", "disassemble", "kernel_names", "wheel_path"]

VERSION = "0.6.13"
REPOSITORY = Path(__file__).parents[3]


def wheel_path() -> Path:
    """Return where `make cubins` puts the wheel.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = REPOSITORY / "build" / "cubins" / f"flashinfer_cubin-{VERSION}-py3-none-any.whl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Run `make cubins`.")
    return path


def kernel_names(types: str, activation: str = "") -> list[str]:
    """Return the file names of batched GEMMs, sorted.

    Args:
        types: output, weights and activations as the names spell them: "E2m1_E2m1E2m1".
        activation: "geGlu", "swiGlu" or "relu2".
    """
    with zipfile.ZipFile(wheel_path()) as wheel:
        names = (name for name in wheel.namelist() if name.endswith(".cubin"))
        return sorted(
            name
            for name in names
            if f"/Bmm_{types}_" in name and activation in name.rpartition("/")[2].split("_")
        )


def disassemble(name: str) -> str:
    """Return what nvdisasm prints of a kernel's code.

    Args:
        name: one of `kernel_names`.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise FileNotFoundError("nvdisasm is not there: it comes with triton. Install triton.")
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with zipfile.ZipFile(wheel_path()) as wheel, tempfile.NamedTemporaryFile() as file:
        file.write(wheel.read(name))
        file.flush()
        call = [str(program), "-c", file.name]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout
