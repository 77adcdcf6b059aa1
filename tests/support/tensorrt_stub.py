"""Import torch_tensorrt where there is neither TensorRT nor a GPU.

The Python of torch_tensorrt and the bindings of TensorRT are the real ones. Stand-ins replace the C
libraries that the bindings link to and what asks for a device. That is enough to lower, to look up
converters and to partition with dryrun=True, and for nothing else: no engine can be built.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import warnings
from unittest import mock

import torch

# Every C function of TensorRT that its Python bindings link to.
POINTERS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
)
SOURCE = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in POINTERS) + (
    "int getNvOnnxParserVersion(void) { return 0; }\n"
    "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n"
)
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def reason_not_to_load() -> str:
    """Why torch_tensorrt cannot be imported even so; empty where it can."""
    for package in ("torch-tensorrt", "tensorrt-cu13-bindings"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"needs {package}; `make tensorrt` installs it and runs this"
    return ""


@contextlib.contextmanager
def pretended_gpu():
    """Answer the questions that torch_tensorrt asks about a device, where there is none."""
    answers = {
        "get_device_capability": lambda device=None: (10, 0),
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in {} if torch.cuda.is_available() else answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


def load():
    """Return torch_tensorrt, imported once with stand-ins for what is missing."""
    if "torch_tensorrt" in sys.modules:
        return sys.modules["torch_tensorrt"]
    _load_libraries(importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0])
    with warnings.catch_warnings(), pretended_gpu(), _without_runtime():
        warnings.simplefilter("ignore")
        _name_bindings_tensorrt()
        if not hasattr(torch._C, "_CudaDeviceProperties"):
            torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
        torch_tensorrt = importlib.import_module("torch_tensorrt")
        for name in ("_compiler", "lowering._decompositions"):
            module = importlib.import_module(f"torch_tensorrt.dynamo.{name}")
            module.to_torch_device = lambda device: torch.device("cpu")
    return torch_tensorrt


def _load_libraries(major: str) -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "stub.c").write_text(SOURCE)
    for name in LIBRARIES:
        library = f"{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "stub.c"]
        subprocess.check_call(command, cwd=folder)
        # What links to a library of this name from now on gets this one.
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)


def _name_bindings_tensorrt() -> None:
    # The package tensorrt does no more than load the libraries and pass these bindings on.
    bindings = importlib.import_module("tensorrt_bindings")
    package = types.ModuleType("tensorrt")
    public = {k: v for k, v in vars(bindings).items() if not k.startswith("__")}
    vars(package).update(public, __version__=bindings.__version__, __file__=bindings.__file__)
    package.__path__, package.__package__ = [], "tensorrt"
    package.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, is_package=True)
    sys.modules["tensorrt"] = package
    package.tensorrt = bindings.tensorrt
    importlib.import_module("tensorrt_bindings.plugin._lib")
    for name in [name for name in sys.modules if name.startswith("tensorrt_bindings.")]:
        sys.modules["tensorrt." + name.split(".", 1)[1]] = sys.modules[name]
    package.plugin = sys.modules["tensorrt_bindings.plugin"]


@contextlib.contextmanager
def _without_runtime():
    # libtorchtrt*.so needs the C++ symbols of TensorRT.
    isfile = os.path.isfile
    with mock.patch("os.path.isfile", lambda p: "libtorchtrt" not in str(p) and isfile(p)):
        yield
