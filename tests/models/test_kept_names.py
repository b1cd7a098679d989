"""transformers finds the same names as without us, and reads its models' files once."""

import ast
import os
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from dspark_batch.models import kept_names

# Prints how many of the models' sources were read, and whether the names are those of the files.
_START = """
import sys
read = []
def hear(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].endswith(".py"):
        read.append(args[0])
sys.addaudithook(hear)
import dspark_batch.models.kept_names
import mlx_lm
from transformers.utils import import_utils as utils
models = utils.__file__.removesuffix("utils/import_utils.py") + "models"
sources = [path for path in read if path.startswith(models)]
print((len(sources), len(set(sources))))
"""
_COMPARE = """
own = utils.spread_import_structure(utils.create_import_structure_from_path(models))
assert utils.define_import_structure(models) == own
own = {needed: {f"m.{k}": v for k, v in its.items()} for needed, its in own.items()}
assert utils.define_import_structure(models, "m") == own
"""


def started(program, cache):
    environment = os.environ | {"DSPARK_BATCH_CACHE": str(cache)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def test_a_second_start_reads_none_of_what_the_first_one_read_once(tmp_path):
    num_read, num_files = started(_START, tmp_path)
    again, _ = started(_START + _COMPARE, tmp_path)
    assert num_files > 1000
    assert num_read - num_files < 20  # once, but for the folder that is imported
    assert again < 20


NAMES = {frozenset(): {"auto": {"Auto"}}, frozenset({"torch"}): {"a.b": {"B", "C"}, "a.c": set()}}


class Files:
    """A folder of models, and who reads it."""

    def __init__(self, root, names):
        self.models = root / "models"
        self.code = root / "utils" / "import_utils.py"
        for path in (self.models / "__init__.py", self.models / "a" / "b.py", self.code):
            path.parent.mkdir(parents=True)
            path.write_text("B = C = 1\n")
        self.names = names
        self.asked = []  # the folders that were read, with their prefixes

    def define(self, module_path, prefix=None):
        self.asked.append((str(module_path), prefix))
        return self.names

    def start(self):
        """Read as a new process does."""
        return kept_names.with_memory(self.define, self.code)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))
    return Files(tmp_path / "transformers", deepcopy(NAMES))


def kept_file(tmp_path):
    (path,) = (tmp_path / "cache" / "machines").iterdir()
    return path


def test_names_are_kept_for_the_folder_of_all_models(files):
    for _ in range(2):
        read = files.start()
        assert read(files.models) == NAMES
        assert read(str(files.models / "__init__.py")) == NAMES
        assert read(files.models, prefix="models") == {
            frozenset(): {"models.auto": {"Auto"}},
            frozenset({"torch"}): {"models.a.b": {"B", "C"}, "models.a.c": set()},
        }
    assert files.asked == [(str(files.models), None)]


def test_what_a_caller_does_to_its_names_is_its_own_affair(files):
    read = files.start()
    read(files.models)[frozenset()]["auto"].add("Mine")
    read(files.models)[frozenset()]["mine"] = set()
    assert read(files.models) == NAMES


def test_other_folders_are_read_as_ever(files):
    files.start()(files.models / "a", prefix="x")
    assert files.asked == [(str(files.models / "a"), "x")]


@pytest.mark.parametrize("changed", ["models/a/b.py", "models/a/new.py", "utils/import_utils.py"])
def test_files_that_changed_are_read_again(files, tmp_path, changed):
    files.start()(files.models)
    (tmp_path / "transformers" / changed).write_text("B = C = D = 1\n")
    files.start()(files.models)
    assert len(files.asked) == 2


def test_a_file_with_another_name_is_another_file(files):
    files.start()(files.models)
    source = files.models / "a" / "b.py"
    source.rename(source.with_name("c.py"))
    files.start()(files.models)
    assert len(files.asked) == 2


def test_a_file_written_again_in_the_same_length_counts_as_changed(files):
    files.start()(files.models)
    source = files.models / "a" / "b.py"
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    files.start()(files.models)
    assert len(files.asked) == 2


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: b"", bytes.upper])
def test_a_damaged_file_is_ignored_and_written_anew(files, tmp_path, damage):
    files.start()(files.models)
    whole = kept_file(tmp_path).read_bytes()
    kept_file(tmp_path).write_bytes(damage(whole))
    assert files.start()(files.models) == NAMES
    assert kept_file(tmp_path).read_bytes() == whole


def test_a_pipe_in_its_place_is_not_waited_for(files, tmp_path):
    files.start()(files.models)
    path = kept_file(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert files.start()(files.models) == NAMES


def test_a_full_disk_is_left_as_it_was(files, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # a file takes 20 bytes, no more
    try:
        assert files.start()(files.models) == NAMES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*(tmp_path / "cache" / "machines").iterdir()]


def test_a_link_to_nowhere_is_left_to_the_reader(files):
    (files.models / "convert_a.py").symlink_to("nowhere")
    assert files.start()(files.models) == NAMES


def test_without_a_folder_to_keep_them_in_each_start_reads(files, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        assert files.start()(files.models) == NAMES
    assert len(files.asked) == 2


def test_so_does_each_start_of_a_user_without_a_home(files, monkeypatch):
    def fails():
        raise RuntimeError("no home")

    monkeypatch.delenv("DSPARK_BATCH_CACHE")
    monkeypatch.setattr("pathlib.Path.home", fails)
    assert files.start()(files.models, "m") is files.names
    assert files.asked == [(str(files.models), "m")]


@pytest.mark.parametrize("odd", [["a"], {"a": ["b"]}, {frozenset(): {"a": ["b"]}}, {(): {1: {2}}}])
def test_what_another_transformers_finds_is_passed_on_as_it_is(files, tmp_path, odd):
    files.names = odd
    read = files.start()
    assert read(files.models, prefix="models") is odd
    assert files.asked[-1] == (str(files.models), "models")
    assert not (tmp_path / "cache").exists()


def test_a_reader_with_other_arguments_is_left_alone(tmp_path):
    source = Path(tmp_path, "import_utils.py")
    source.write_text("def define_import_structure(folder): return folder\n")
    loader = kept_names._Loader("import_utils", str(source))
    module = type(sys)("import_utils")
    loader.exec_module(module)
    assert module.define_import_structure("models") == "models"
