"""The package that users install is the one in the repository: every module, one home, one name."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {"fp4moe": ROOT / "src" / "fp4moe", "fp4moe.passes": ROOT / "passes"}
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def packages_on_disk() -> set[str]:
    return {
        ".".join([name, *init.parent.relative_to(folder).parts])
        for name, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
    }


def modules_on_disk() -> set[str]:
    """Every module as its path in a wheel."""
    return {
        "/".join([*name.split("."), *file.relative_to(folder).parts])
        for name, folder in SOURCES.items()
        for file in folder.rglob("*.py")
    }


def python(*arguments: str, cwd: pathlib.Path, path: pathlib.Path | None = None) -> str:
    """Run this interpreter outside the repository; its output, or a failure that shows it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(tree: pathlib.Path, kind: str, out: pathlib.Path) -> pathlib.Path:
    """Build the "wheel" or "sdist" of a tree with what is installed here, without a network."""
    python("-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(tree), cwd=out)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    tree = tmp_path_factory.mktemp("source") / "fp4moe"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked_sdist(sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module", params=["repository", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built from the repository and again from the sdist."""
    if request.param == "sdist":
        tree = request.getfixturevalue("unpacked_sdist")
    else:
        tree = tmp_path_factory.mktemp("source") / "fp4moe"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def test_every_package_is_listed_for_the_wheel():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(set(listed) ^ packages_on_disk()) == [], "in one place only"
    assert len(listed) == len(set(listed))


def test_passes_has_one_home_and_one_name():
    import fp4moe.passes

    assert fp4moe.passes.__name__ == "fp4moe.passes"
    assert "passes" not in sys.modules
    assert not (SOURCES["fp4moe"] / "passes").exists()


def test_passes_refuses_its_second_name():
    code = "import passes"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "must be imported as fp4moe.passes; got passes" in done.stderr


def test_the_version_is_read_without_importing_torch(tmp_path: pathlib.Path):
    import fp4moe
    from fp4moe.version import __version__

    file = SOURCES["fp4moe"] / "version.py"
    code = (
        "import runpy, sys\n"
        f"version = runpy.run_path({str(file)!r})['__version__']\n"
        "assert 'torch' not in sys.modules\n"
        "print(version)"
    )
    assert python("-c", code, cwd=tmp_path).strip() == __version__ == fp4moe.__version__


@pytest.mark.slow
def test_the_wheel_has_every_module_and_nothing_else(wheel: pathlib.Path):
    from fp4moe.version import __version__

    assert wheel.name == f"fp4moe-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = modules_on_disk() | {"fp4moe/py.typed", "fp4moe/kernels/measured.json"}
    parts = ("activation", "common", "gemm", "load")
    wanted |= {f"fp4moe/kernels/hopper/{part}.cu" for part in parts}
    assert sorted(files ^ wanted) == [], "in the wheel or the repository only"


@pytest.mark.slow
def test_the_wheel_imports_from_anywhere(wheel: pathlib.Path, tmp_path: pathlib.Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import fp4moe.passes; print(fp4moe.__file__); print(fp4moe.passes.__file__)"
    found = python("-c", code, cwd=tmp_path, path=tmp_path / "installed").split()
    package = tmp_path / "installed" / "fp4moe"
    assert found == [str(package / "__init__.py"), str(package / "passes" / "__init__.py")]
    # What `make release` runs in empty environments.
    smoke = python(str(ROOT / ".ci" / "smoke.py"), cwd=tmp_path, path=tmp_path / "installed")
    assert smoke.rstrip().endswith("fine")


def test_the_sdist_has_passes_tests_and_examples(unpacked_sdist: pathlib.Path):
    for folder in ("src", "passes", "tests", "examples"):
        wanted = {
            str(file.relative_to(ROOT))
            for file in (ROOT / folder).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        wanted = {name for name in wanted if ".egg-info" not in name}
        shipped = {
            str(file.relative_to(unpacked_sdist)) for file in (unpacked_sdist / folder).rglob("*")
        }
        assert wanted, f"{folder}/ has no files"
        assert wanted <= shipped, f"{folder}/ in the sdist lacks {sorted(wanted - shipped)}"
