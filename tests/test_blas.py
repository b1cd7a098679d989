"""OpenBLAS helps only if it is there before MLX, and nobody is told otherwise."""

import ctypes
import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dspark_batch import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux loads a BLAS")
packaged = pytest.mark.skipif(
    find_spec("scipy_openblas32") is None, reason="scipy-openblas32 is not installed"
)
TELL = (
    "from dspark_batch import blas; had = blas.LOADED;"
    "print(had.kind, blas.identity(), had.why, sep='|')"
)
NO_PACKAGE = "import sys; sys.modules['scipy_openblas32'] = None"
CHOSEN = ("DSPARK_BATCH_BLAS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "LD_PRELOAD")


def started(code, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(code, **environment):
    process = started(code, **environment)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip()


@functools.cache
def told(code="pass", **environment):
    """What another process says about its BLAS: kind, identity, why."""
    return output(f"{code}\n{TELL}", **environment).split("|")


def library_of_mlx():
    """A BLAS that is no OpenBLAS, and that every machine has."""
    import mlx.core as mx  # not before the BLAS

    libraries = list(Path(mx.__file__).parent.parent.glob("mlx*.libs/libblas-*.so*"))
    if not libraries:
        pytest.skip("this MLX brings no BLAS of its own")
    return str(libraries[0])


def test_mlx_that_came_first_keeps_its_own_blas():
    assert told("import mlx.core") == [
        "bundled",
        "mlx's own",
        "mlx was imported before dspark_batch",
    ]


def test_the_user_can_keep_the_bundled_one():
    assert told(DSPARK_BATCH_BLAS="bundled") == [
        "bundled",
        "mlx's own",
        "DSPARK_BATCH_BLAS chose it",
    ]


@pytest.mark.parametrize(
    "module",
    ["", ".engine.engine", ".answers.steering", ".caches.prefix_cache", ".pair", ".numerics.masks"],
)
def test_every_door_to_mlx_loads_the_blas_first(module):
    assert told(f"import dspark_batch{module}, mlx.core") == told()


@packaged
def test_the_package_is_enough():
    kind, identity, why = told()
    assert (kind, why) == ("openblas", "scipy_openblas32 is installed")
    assert identity.startswith("OpenBLAS 0.")
    assert identity.endswith(", threads 1")


@packaged
def test_mlx_multiplies_with_it():
    # Rows longer than what any kernel sums up in one go: then each BLAS has bits of its own.
    bits = """
import dspark_batch, mlx.core as mx, zlib
mx.set_default_device(mx.cpu)
x = mx.random.normal((64, 3000), key=mx.random.key(1))
print(zlib.crc32(bytes(memoryview(x @ x.T))))
"""
    ours = output(bits)
    assert ours == output(bits)
    assert ours != output(bits, DSPARK_BATCH_BLAS="bundled")


@packaged
def test_products_and_factors_are_right():
    products = """
import dspark_batch, mlx.core as mx
mx.set_default_device(mx.cpu)
x = mx.random.normal((48, 48), key=mx.random.key(3))
slow = (x[:, :, None] * x[None]).sum(axis=1)
q, r = mx.linalg.qr(x)
u, s, v = mx.linalg.svd(x)
complex = (x + 1j * x) @ (x - 1j * x)
for product, right in ((x @ x, slow), (q @ r, x), ((u * s) @ v, x), (complex, 2 * slow)):
    print(mx.allclose(product, right, atol=1e-3).item())
"""
    assert output(products).split() == ["True"] * 4


def test_without_the_package_the_system_is_asked():
    without, system = told(NO_PACKAGE), told(DSPARK_BATCH_BLAS="system")
    assert without[:2] == system[:2]
    assert without[2] in ("the system has it", "no OpenBLAS is installed")


@packaged
def test_a_package_that_does_not_load_is_told_and_passed_over(tmp_path):
    library = tmp_path / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"torn")
    (tmp_path / "scipy_openblas32" / "__init__.py").touch()
    system = told(DSPARK_BATCH_BLAS="system")
    kind, identity, why = told(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert [kind, identity] == system[:2]
    assert f"{library}: file too short" in why


def test_a_path_chooses_a_library_that_is_told_by_its_digest():
    kind, identity, why = told(DSPARK_BATCH_BLAS=library_of_mlx())
    assert (kind, why) == ("other", "DSPARK_BATCH_BLAS chose it")
    assert identity.startswith(f"{Path(library_of_mlx()).name}, sha256 ")


@packaged
def test_a_path_may_lead_to_an_openblas_with_prefixed_names():
    path = blas._packaged()[0]
    assert told(DSPARK_BATCH_BLAS=path) == [*told()[:2], "DSPARK_BATCH_BLAS chose it"]


def test_a_path_to_no_blas_leaves_mlx_its_own():
    kind, _, why = told(DSPARK_BATCH_BLAS="libm.so.6")
    assert (kind, why) == ("bundled", "libm.so.6: it has no cblas_sgemm")
    kind, _, why = told(DSPARK_BATCH_BLAS="/nowhere/lib.so")
    assert (kind, why.split(":")[0]) == ("bundled", "/nowhere/lib.so")


def test_a_library_with_long_integers_is_refused(monkeypatch):
    monkeypatch.setattr(blas, "_text", lambda library, function: "OpenBLAS 0.3 USE64BITINT")
    with pytest.raises(blas._Unusable, match="its integers have 64 bits"):
        blas._load_globally(library_of_mlx())


def test_a_blas_that_was_there_before_is_the_one():
    path = library_of_mlx()
    kind, identity, why = told(f"import ctypes; ctypes.CDLL({path!r}, mode=ctypes.RTLD_GLOBAL)")
    assert (kind, why) == ("other", "it was in this process before")
    assert [kind, identity] == told(LD_PRELOAD=path)[:2]


@packaged
def test_no_file_and_no_folder_is_needed(tmp_path):
    at = {name: str(tmp_path / "none") for name in ("HOME", "DSPARK_BATCH_CACHE", "TMPDIR")}
    assert told(**at) == told()
    assert list(tmp_path.iterdir()) == []


@packaged
def test_where_no_file_in_memory_can_be_made_the_next_one_is_taken():
    none_left = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    kind, identity, why = told(
        f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{none_left}"
    )
    assert [kind, identity] == told(NO_PACKAGE)[:2]
    assert "File too large" in why


@packaged
def test_processes_that_start_at_once_load_the_same():
    processes = [started(TELL) for _ in range(4)]
    assert len({process.communicate()[0] for process in processes}) == 1


@packaged
def test_the_kernel_decides_bits_so_it_is_told():
    kernels = {"x86_64": "Haswell", "aarch64": "CORTEXA57"}
    kernel = kernels[os.uname().machine]
    assert f"kernel {kernel.lower()}" in told(OPENBLAS_CORETYPE=kernel)[1].lower()


@packaged
@pytest.mark.parametrize(
    ("named", "threads"), [("", 1), ("3", 3), ("0", 1), ("-2", 1), ("many", 1), ("2.5", 1)]
)
def test_one_thread_unless_the_environment_names_another_number(named, threads):
    code = f"{TELL}; print(blas.num_threads())"
    *_, said = output(code, OPENBLAS_NUM_THREADS=named, OMP_NUM_THREADS="4").split("\n")
    assert int(said) == threads


@packaged
def test_a_resume_can_set_the_threads_of_the_first_start():
    code = f"from dspark_batch import blas; blas.set_num_threads(5); {TELL}"
    assert output(code).split("|")[1].endswith(", threads 5")


def test_a_blas_without_threads_takes_no_number():
    code = "from dspark_batch import blas; blas.set_num_threads(2); print(blas.num_threads())"
    assert output(code, DSPARK_BATCH_BLAS="bundled") == "None"


def test_importing_the_package_imports_no_mlx():
    code = (
        "import sys, dspark_batch; print({'mlx', 'numpy', 'scipy_openblas32'} & set(sys.modules))"
    )
    assert output(code) == "set()"


def test_a_library_of_names_has_each_at_its_address():
    libc = ctypes.CDLL(None)
    addresses = {f"{name}_again": blas._address(libc, name) for name in ("getpid", "getppid")}
    names = ctypes.CDLL(blas._in_memory(blas.names_library(addresses)))
    assert (names.getpid_again(), names.getppid_again()) == (os.getpid(), os.getppid())
    assert not hasattr(names, "getpid")


@pytest.fixture
def on_a_cpu(monkeypatch):
    import mlx.core as mx  # not before the BLAS

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))


HINTS = {
    "no OpenBLAS is installed": "Install OpenBLAS: pip install 'dspark-batch[cpu]', or apt install",
    "mlx was imported before dspark_batch": "Import dspark_batch first.",
}


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("why", "advice"), HINTS.items())
def test_the_hint_says_what_helps(monkeypatch, why, advice):
    monkeypatch.delenv("DSPARK_BATCH_BLAS", raising=False)
    monkeypatch.setattr(blas, "LOADED", blas.Blas("bundled", why))
    assert f"{why}. {advice}" in blas.hint()


@pytest.mark.usefixtures("on_a_cpu")
def test_the_hint_about_a_wrong_choice_names_it(monkeypatch):
    monkeypatch.setenv("DSPARK_BATCH_BLAS", "/nowhere/lib.so")
    monkeypatch.setattr(blas, "LOADED", blas.Blas("bundled", "/nowhere/lib.so: cannot open it"))
    assert "/nowhere/lib.so: cannot open it. Correct DSPARK_BATCH_BLAS" in blas.hint()
