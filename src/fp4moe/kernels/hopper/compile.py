"""Compile CUDA source with the NVRTC that torch brings, keep the machine code, launch it.

Machine code is kept in a file named by the hash of everything that it depends on; a file that is
there is loaded without NVRTC.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import tempfile

import torch

from ...errors import refuse

__all__ = ["Function", "cache_folder", "compile_source", "load_function"]

NAME = b"gemm"
OPTIONS = ("--std=c++17", "--gpu-architecture=sm_90a")
MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def cache_folder() -> pathlib.Path:
    """Return where machine code is kept: fp4moe/cubins in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fp4moe" / "cubins"


@functools.cache
def nvrtc(version: str | None = torch.version.cuda) -> ctypes.CDLL | None:
    """Return NVRTC of a version of CUDA, by default torch's; None where it cannot be found."""
    if version is None:
        return None
    name = f"libnvrtc.so.{version.split('.')[0]}"
    found = importlib.util.find_spec("nvidia")
    folders = map(pathlib.Path, (found.submodule_search_locations or ()) if found else ())
    paths = [path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for path in paths:
        # NVRTC asks for these by name alone.
        for part in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(part))
        return ctypes.CDLL(str(path))
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def compile_source(source: str, library: ctypes.CDLL) -> bytes:
    """Compile source to machine code for 9.0a.

    Raises:
        UnsupportedError: NVRTC refuses it; says what it wrote.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * len(OPTIONS))(*map(str.encode, OPTIONS))
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"gemm.cu", 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    status = library.nvrtcCompileProgram(program, len(OPTIONS), options)
    if status:
        _check(
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize"
        )
        log = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
        refuse(
            "moe",
            "the CUDA source of kernel hopper cannot be compiled",
            f"NVRTC returned {status}: {log.value.decode().strip()}",
            'Pass kernel="triton", and report this with the output of fp4moe info.',
        )
    _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    code = ctypes.create_string_buffer(size.value)
    _check(library.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _machine_code(source: str) -> bytes:
    library = nvrtc()
    assert library is not None  # package_reasons has asked
    version = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = repr((source, OPTIONS, version[0].value, version[1].value))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_source(source, library)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: other processes may look for the same file.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


class Function:
    """A kernel on one device: launches take its arguments as one structure."""

    def __init__(self, code: bytes, shared_bytes: int, device: torch.device) -> None:
        self.shared_bytes = shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver, mode = _driver(), ctypes.c_int(RELAXED)
        with torch.cuda.device(device):
            torch.cuda.current_stream()
            # A module may be loaded while a graph is captured: nothing of it is in the graph.
            _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "capture mode")
            try:
                load = driver.cuModuleLoadData(ctypes.byref(self._module), code)
                _check(load, "cuModuleLoadData")
                _check(
                    driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, NAME),
                    "cuModuleGetFunction",
                )
                _check(
                    driver.cuFuncSetAttribute(
                        self._function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes
                    ),
                    "cuFuncSetAttribute",
                )
            finally:
                driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def launch(self, blocks: int, threads: int, arguments: ctypes.Structure) -> None:
        """Launch on the current stream of the current device."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            _driver().cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, pointers,
                None,
            ),
            "cuLaunchKernel",
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def load_function(source: str, shared_bytes: int, device: torch.device) -> Function:
    """Return the kernel `gemm` of a source on a device, compiled once."""
    return Function(_machine_code(source), shared_bytes, device)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        advice = 'Pass kernel="triton", and report this with the output of fp4moe info.'
        refuse("moe", f"{what} failed for kernel hopper", f"it returned {status}", advice)
