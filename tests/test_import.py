"""Importing is silent, starts nothing and touches nothing."""

import sys

import pytest

from conftest import run_python


def test_nothing_is_printed() -> None:
    assert run_python("import candle_phi, candle_phi.cli") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_no_thread_is_started() -> None:
    assert run_python("import candle_phi, os; print(len(os.listdir('/proc/self/task')))") == "1\n"


def test_only_the_standard_library_is_needed() -> None:
    found = run_python(
        "import sys; before = set(sys.modules); import candle_phi\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert found == "['candle_phi']\n"


def test_the_command_lines_modules_are_not_imported() -> None:
    assert (
        run_python("import candle_phi, sys; print('argparse' in sys.modules, 'asyncio' in sys.modules)")
        == "False False\n"
    )


def test_no_output_without_streams() -> None:
    assert (
        run_python("import sys; sys.stdout = sys.stderr = None\nfrom candle_phi import Phi\nPhi.demo().generate('Hi')")
        == ""
    )
