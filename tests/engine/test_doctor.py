"""`stopgo doctor`: its lines and page, that it never fails itself, and what it says where compiler, data or packages lack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.doctor import page
from engine.doctor.__main__ import SECTIONS, main
from engine.doctor.lines import Asked, Line, examine
from pipelines.errors import BadInput
from tests.engine.doctor_page import line_of

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("state", "mend"), [("good", "make setup"), ("note", ""), ("problem", "")])
def test_notes_and_problems_have_a_mend_and_good_lines_have_none(state: str, mend: str) -> None:
    with pytest.raises(ValueError, match="the mend"):
        Line("x", "y", state, mend)  # type: ignore[arg-type]


def failing(asked: Asked) -> Iterator[Line]:
    yield Line("before", "said")
    raise asked.config  # type: ignore[misc]  # whatever the test gives


UNTOLD = "stopgo doctor --debug"
FAILURES: list[tuple[Exception, str, str, str]] = [
    (PermissionError(13, "no", "/sys/x"), "cannot be told: PermissionError: [Errno 13] no: '/sys/x'", "note", UNTOLD),
    (KeyError("MemTotal"), "cannot be told: KeyError: 'MemTotal'", "note", UNTOLD),
    (ImportError("No module named 'torch'"), "cannot be told: No module named 'torch'", "problem", "make setup"),
    (BadInput("a.yaml: key", "is wrong", "do this"), "a.yaml: key: is wrong", "problem", "do this"),
]


@pytest.mark.parametrize(("error", "value", "state", "mend"), FAILURES)
def test_a_probe_that_fails_is_a_line(error: Exception, value: str, state: str, mend: str) -> None:
    after = Line("after", "said too")
    found = examine({"it": failing, "next": lambda asked: [after]}, Asked(config=error))  # type: ignore[arg-type]
    assert found == [Line("before", "said"), Line("it", value, state, mend), after]  # type: ignore[arg-type]


def test_the_traceback_of_a_failed_probe_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    examine({"it": failing}, Asked(config=KeyError("x")))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    examine({"it": failing}, Asked(config=KeyError("x"), debug=True))  # type: ignore[arg-type]
    assert "Traceback" in capsys.readouterr().err


def test_the_plain_page_has_a_line_for_each_and_the_mend_below() -> None:
    sections = {
        "a": [Line("one", "1" * 200), Line("two", "2", "note", "do this")],
        "b": [Line("three", "3", "problem", "that")],
    }
    assert page.plain(sections).splitlines() == [
        "a",
        f"good     one    {'1' * 200}",
        "note     two    2",
        "                mend: do this",
        "",
        "b",
        "problem  three  3",
        "                mend: that",
        "",
        "1 problem, 1 note",
    ]


BARE = ("engine", "kernels", "pipelines", "configs")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing has been built, and no data have been put."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in BARE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, folder)
    (folder / "bin").mkdir()
    return folder


def doctor(bare: Path, *arguments: str, flag: str = "-B", **environment: str) -> tuple[int, str]:
    """Exit code and page of the command in that checkout, where no program can be found."""
    left = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, flag, "-m", "engine.doctor", *arguments], cwd=bare, text=True, capture_output=True, check=False,
        env={**left, "PATH": str(bare / "bin"), **environment}, timeout=120,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_without_a_compiler_and_without_data_every_problem_has_its_mend(bare: Path) -> None:
    code, text = doctor(bare, "--config", "configs/runs/twelve_in_one.yaml", "--json", "out/lines.json")
    assert code == 1
    for what, mend in (
        ("compiler", "sudo apt-get install g++"),
        ("native kernels", "sudo apt-get install g++"),
        ("copying features", "sudo apt-get install g++"),
        ("files", "stopgo check configs/runs/twelve_in_one.yaml"),
        ("store", "stopgo features FORMAT SOURCE datasets/features/coco.lmdb"),
    ):
        line = line_of(text, what)
        assert line.startswith("problem") and line.endswith(f"mend: {mend}")
    assert "torch (no C++ compiler found): attention, " in line_of(text, "on the CPU")
    data = json.loads((bare / "out" / "lines.json").read_text())["lines"]
    assert {line["section"] for line in data} == {"packages", "machine", "kernels", "data"}
    assert all(f"{line['state']:7}  {line['what']:16}"[:20] in text and line["value"] in text for line in data)
    assert all(bool(line["mend"]) == (line["state"] != "good") for line in data)


def test_a_terminal_that_knows_few_letters_gets_the_page(bare: Path) -> None:
    code = "from engine.doctor import page; from engine.doctor.lines import Line; page.show({'a': [Line('x', '× \\udcff')]})"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=bare, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    assert rb"good     x  \xd7 \udcff" in done.stdout


def test_without_any_package_the_page_comes_out_and_says_so(bare: Path) -> None:
    """-S: nothing but the standard library can be imported."""
    code, text = doctor(bare, flag="-S")
    assert code == 1
    assert line_of(text, "torch").endswith("mend: make setup") and "not installed" in line_of(text, "torch")
    assert line_of(text, "memory").startswith(("good", "note", "problem"))
    assert "No module named 'torch'" in line_of(text, "threads")
    assert "Traceback" not in text


def test_an_environment_that_asks_for_what_is_not_there(bare: Path) -> None:
    code, text = doctor(bare, STOPGO_ISA="mmx", STOPGO_KERNELS="attention=quick", CXX="no-such-compiler")
    assert code == 1
    for what, said, mend in (
        ("compiler", "no-such-compiler: no such program", "unset CXX"),
        ("native kernels", "there are amx", "unset STOPGO_ISA"),
        ("ops", "no backend is called 'quick'", "unset STOPGO_KERNELS STOPGO_ISA"),
    ):
        line = line_of(text, what)
        assert line.startswith("problem") and said in line and line.endswith(f"mend: {mend}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["nowhere"], "nowhere: not a run folder"),
        (["--json", "/proc/none/lines.json"], "--json /proc/none/lines.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.doctor.__main__.SECTIONS", {"a": {"b": lambda asked: [Line("c", "d")]}})
    assert main(arguments) == 2
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err.startswith(f"error: {said}") and caught.err.count("\n") == 1


def test_the_exit_code_says_whether_there_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for state, mend, code in (("good", "", 0), ("note", "x", 0), ("problem", "x", 1)):
        line = Line("c", "d", state, mend)  # type: ignore[arg-type]
        monkeypatch.setattr("engine.doctor.__main__.SECTIONS", {"a": {"b": lambda asked, line=line: [line]}})
        assert main([]) == code
        assert line.state in capsys.readouterr().out


def test_every_probe_has_a_name_of_its_own() -> None:
    names = [name for probes in SECTIONS.values() for name in probes]
    assert len(names) == len(set(names))
