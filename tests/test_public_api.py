"""`import dspark_batch` is a door: light, complete, and the same from every side."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dspark_batch

TYPED_USER = Path(__file__).with_name("typed_user.py")


def run_python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", dspark_batch.__all__)
def test_every_public_name_exists_and_is_described(name):
    value = getattr(dspark_batch, name)
    assert value.__name__ == name
    assert value.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        _ = dspark_batch.walk


def test_import_loads_nothing_heavy():
    loaded = run_python("import sys, dspark_batch; print(*sys.modules)").split()
    assert "dspark_batch" in loaded
    assert not {"mlx", "mlx.core", "pyarrow", "click", "rich"} & set(loaded)


def test_a_function_keeps_its_name_although_a_module_has_it_too():
    """In one process for all, each time with a package that was never imported."""
    program = """
import sys
for name in ("run", "calibrate", "bench", "generate"):
    for first in ("pass", "import dspark_batch.{0}", "from dspark_batch.{0} import dataclass"):
        for loaded in [each for each in sys.modules if each.split(".")[0] == "dspark_batch"]:
            del sys.modules[loaded]
        known = {}
        exec(first.format(name) + f"; from dspark_batch import {name}; import dspark_batch", known)
        both = known[name], getattr(known["dspark_batch"], name)
        print(name, first, *(type(each).__name__ for each in both), sep="|")
"""
    said = [line.split("|") for line in run_python(program).splitlines()]
    assert len(said) == 12
    assert [case for case in said if case[2:] != ["function", "function"]] == []


def test_a_checker_sees_each_name_where_it_is_imported_from():
    """A checker reads the imports for types; the program reads the table."""
    tree = ast.parse(Path(dspark_batch.__file__).read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and "Import" in ast.dump(node)
    )
    typed = {
        alias.asname: node.module.removeprefix("dspark_batch.")
        for node in block.body
        for alias in node.names
    }
    assert typed == dspark_batch._MODULE_BY_NAME


PLANTED = {
    "Spec(inputs=(str(prompts),)": "Spec(inputs=str(prompts)",
    "tick.gauge.busy_slots if tick.gauge else None": "tick.gauge.busy_slots",
    "yield row.text": "yield row.code",
    "audit.exit_code": "audit.exitcode",
    "from dspark_batch import (\n": "from dspark_batch import (\n    walk,\n",
}


def test_a_checker_sees_each_mistake_of_a_user_and_no_other(tmp_path):
    pytest.importorskip("mypy")
    source = TYPED_USER.read_text()
    for right, wrong in PLANTED.items():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    planted = tmp_path / TYPED_USER.name  # pyproject.toml knows the strict one by its name
    planted.write_text(source)
    shutil.copy(TYPED_USER.parents[1] / "pyproject.toml", tmp_path)
    command = (sys.executable, "-m", "mypy", "--config-file", tmp_path / "pyproject.toml", planted)
    done = subprocess.run(command, cwd=TYPED_USER.parents[1], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    starts = [source.index(wrong) for wrong in PLANTED.values()]
    expected = {f"{planted.name}:{source.count(chr(10), 0, start) + 1}" for start in starts}
    said = [line.partition(": error:")[0] for line in done.stdout.splitlines()[:-1]]
    found = {Path(place).name for place in said}  # what mypy kept of an earlier run has its folder
    assert found == expected, done.stdout
