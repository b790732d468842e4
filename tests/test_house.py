"""The rules of the house: who may import whom and what, what stays free of torch, and what setup refuses."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.cli import COMMANDS, main
from kernels import native_library
from pipelines import copy_runs

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "kernels": {"kernels", "torch", "triton"},
    "pipelines": {
        "pipelines", "numpy", "lmdb", "msgpack", "tokenizers", "pydantic", "yaml", "PIL", "torch", "rich", "nvidia",
        "matplotlib",  # the embedded world's picture
        "kernels",  # kernels.native_build alone, which compiles for both: the import rule sees to that
        "safetensors", "torchvision",  # a detector for photographs
    },
}  # fmt: skip
"""What the two lower folders may import beside the standard library."""

DEEPSPEED_FILES = {"engine/sharded.py", "engine/zero_folder.py"}
"""Files that import deepspeed: as few as can be."""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def imports(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def torch_free_modules() -> list[str]:
    """The modules that the import-linter contract keeps free of torch."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(contract["source_modules"] for contract in contracts if "no torch" in contract["name"])


def test_the_import_rule() -> None:
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_lower_folders_import_only_what_they_may(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        foreign = imports(file) - ALLOWED[folder] - sys.stdlib_module_names
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_nobody_imports_benchmarks_or_tests_and_few_import_deepspeed() -> None:
    for folder in ("engine", "kernels", "pipelines"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not imports(file) & {"bench", "tests"}, file
            assert "deepspeed" not in imports(file) or str(file.relative_to(ROOT)) in DEEPSPEED_FILES, file


@pytest.mark.parametrize("module", torch_free_modules())
def test_what_decides_imports_no_torch(module: str) -> None:
    done = run(sys.executable, "-c", f"import {module}, sys; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["engine", "kernels", "pipelines", "bench"])
def test_every_folder_of_code_is_a_package(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        assert (file.parent / "__init__.py").exists(), f"{file.parent.relative_to(ROOT)} has no __init__.py"


def test_kernels_is_our_own_folder() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is not None
    assert spec.origin == str(ROOT / "kernels" / "__init__.py")


def test_a_foreign_kernels_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "from engine.house import check_imports; check_imports()"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    assert "BadInput" in done.stderr
    assert "the name `kernels` leads there" in done.stderr


@pytest.mark.parametrize("command", ["bdist_wheel", "sdist"])
def test_no_wheel_is_built(command: str, tmp_path: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), command, "-d", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: stopgo: no wheel or sdist is built")
    assert not list(tmp_path.glob("*.whl")) + list(tmp_path.glob("*.tar.gz"))


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line.partition("#")[0].strip() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("file", "one"), [("requirements.txt", "torch==2.13.0"), ("requirements-dali.txt", "nvidia-dali-cuda130==2.4.0")]
)
def test_requirements_are_pinned_without_local_labels(file: str, one: str) -> None:
    assert one in pins(file)
    assert all("==" in pin and "+" not in pin for pin in pins(file))


def test_all_that_dali_needs_is_pinned() -> None:
    """Else pip would take the newest of it on the day."""
    pinned = {
        canonicalize_name(pin.partition("==")[0]) for name in ("", "-dali") for pin in pins(f"requirements{name}.txt")
    }
    for pin in pins("requirements-dali.txt"):
        name = pin.partition("==")[0]
        try:
            found = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed (make setup-dali)")
        for requirement in map(Requirement, found):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in pinned, f"{name} needs {requirement}"


def test_cmake_builds_the_libraries_that_are_looked_for(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    for folder in ("kernels/native", "pipelines/native"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    isa = native_library.best_isa()
    configure = ("cmake", "-S", ".", "-B", "build/cmake", f"-DSTOPGO_ISAS={isa}")
    for command in (configure, ("cmake", "--build", "build/cmake", "-j2")):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    built = {file.name for file in (tmp_path / "build").glob("*.so")}
    assert built == {native_library.path_of(isa).name, copy_runs.path().name}


def test_every_command_has_a_module_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command, (module, text) in COMMANDS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert "def main(" in Path(spec.origin).read_text()
        assert f"  {command}" in shown
        assert text in shown


def test_a_command_gets_the_arguments_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--help"])
    assert stopped.value.code == 0
    assert "data sheet" in capsys.readouterr().out


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == f"error: no command trian (there are {', '.join(COMMANDS)})\n"
