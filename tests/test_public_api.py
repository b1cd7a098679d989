"""`import dspark_batch` is a door: light, complete, and the same from every side."""

import subprocess
import sys

import pytest

import dspark_batch


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
