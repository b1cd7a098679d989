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


@pytest.mark.parametrize("name", ["run", "calibrate", "bench", "generate"])
@pytest.mark.parametrize(
    "first", ["pass", "import dspark_batch.{0}", "from dspark_batch.{0} import dataclass"]
)
def test_a_function_keeps_its_name_although_a_module_has_it_too(first, name):
    first = first.format(name)
    says = f"import dspark_batch, types; print(type(dspark_batch.{name}) is types.FunctionType)"
    assert run_python(f"{first}; from dspark_batch import {name}; {says}") == "True\n"


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
    "    bench,\n": "    bench,\n    walk,\n",
}


@pytest.mark.parametrize("right", PLANTED)
def test_a_checker_sees_a_mistake_of_a_user(right, tmp_path):
    pytest.importorskip("mypy")
    source = TYPED_USER.read_text()
    assert right in source
    planted = tmp_path / TYPED_USER.name  # pyproject.toml knows the strict one by its name
    planted.write_text(source.replace(right, PLANTED[right]))
    shutil.copy(TYPED_USER.parents[1] / "pyproject.toml", tmp_path)
    command = (sys.executable, "-m", "mypy", "--config-file", tmp_path / "pyproject.toml", planted)
    done = subprocess.run(command, cwd=TYPED_USER.parents[1], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert {line.split(":")[0] for line in done.stdout.splitlines()[:-1]} == {str(planted)}
