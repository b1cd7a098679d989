"""What NVRTC and MLX are given for a kernel of ours; nothing here needs a GPU."""

import hashlib
import sys

import mlx.core as mx
import numpy as np
import pytest

from dspark_batch.numerics import cuda_kernels
from dspark_batch.numerics.cuda_kernels import CudaKernel


class _Mlx:
    """Notes what MLX is asked for, in place of `mx.fast`."""

    def __init__(self):
        self.called = []

    def cuda_kernel(self, **about):
        return lambda **given: self.called.append(("by MLX", about, given)) or "made"

    def precompiled_cuda_kernel(self, **given):
        self.called.append(("precompiled", given))
        return "made"


@pytest.fixture
def mlx(monkeypatch):
    stand_in = _Mlx()
    monkeypatch.setattr(mx, "fast", stand_in)
    monkeypatch.setattr(cuda_kernels, "_finds_programs", lambda: False)
    return stand_in


def _kernel():
    return CudaKernel(
        "copy_1",
        ["left", "right"],
        ["out"],
        header="struct A {};",
        source="copy<N, T>(left, right[0], out, scale, total, left_shape[1], left_shape[0]);",
        numbers={"scale": "float", "total": "int"},
    )


def _run(kernel, *, dtype=mx.bfloat16, number=8):
    return kernel(
        numbers={"total": 9, "scale": 0.1},
        inputs=[mx.zeros((3, 5), dtype), mx.zeros((1,), mx.int32)],
        template=[("N", number), ("T", dtype), ("IS_WIDE", True)],
        output_shapes=[(3, 5)],
        output_dtypes=[dtype],
        grid=(4, 1, 1),
        threadgroup=(2, 1, 1),
    )


def test_a_program_has_the_arrays_their_sizes_and_what_is_fixed(mlx, monkeypatch):
    texts = []
    monkeypatch.setattr(cuda_kernels, "compiled", lambda text: texts.append(text) or b"binary")

    assert _run(_kernel()) == "made"

    ((way, given),) = mlx.called
    name = given["name"]
    assert texts == [
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\nstruct A {};\n"
        f'extern "C" __global__ void {name}(const __nv_bfloat16* left, const int* right, '
        "__nv_bfloat16* out, int scale_bits, int total, int left_shape_0, int left_shape_1) {\n"
        "constexpr int N = 8;\nusing T = __nv_bfloat16;\nconstexpr bool IS_WIDE = 1;\n"
        "const float scale = __int_as_float(scale_bits);\n"
        "copy<N, T>(left, right[0], out, scale, total, left_shape_1, left_shape_0);\n}\n"
    ]
    assert way == "precompiled"
    bits = int(np.float32(0.1).view(np.int32))
    assert (given["compiled_source"], given["scalars"]) == (b"binary", [bits, 9, 3, 5])
    assert given["ensure_row_contiguous"] is True
    assert (given["grid"], given["threadgroup"]) == ((4, 1, 1), (2, 1, 1))


def test_each_program_is_compiled_once_and_has_a_name_of_its_own(mlx, monkeypatch):
    texts = []
    monkeypatch.setattr(cuda_kernels, "compiled", lambda text: texts.append(text) or b"binary")
    kernel = _kernel()

    for settings in ({}, {}, {"number": 16}, {"dtype": mx.float32}, {}):
        _run(kernel, **settings)

    names = [given["name"] for _, given in mlx.called]
    assert len(texts) == len(set(texts)) == 3
    assert names[0] == names[1] == names[4]
    assert len(set(names)) == 3
    assert all(name.startswith("copy_1_") for name in names)


def test_what_nvrtc_cannot_compile_mlx_does(mlx, monkeypatch):
    tried = []
    monkeypatch.setattr(cuda_kernels, "compiled", lambda text: tried.append(text))

    kernel = _kernel()
    assert [_run(kernel), _run(kernel)] == ["made", "made"]

    assert len(tried) == 1  # the second time nothing is tried
    way, about, given = mlx.called[0]
    assert way == "by MLX"
    assert "left_shape[1]" in about["source"]
    assert about["source"].startswith(
        "const int total = ints[0];\nconst float scale = floats[0];\n"
    )
    assert about["input_names"] == ["left", "right", "ints", "floats"]
    ints, floats = given["inputs"][2:]
    assert (ints.tolist(), floats.tolist()) == ([9], [np.float32(0.1).item()])
    assert given["template"] == [("N", 8), ("T", mx.bfloat16), ("IS_WIDE", True)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(cuda_kernels, "_hash", lambda word: 0xAB)
    return tmp_path / "kept"


def test_a_program_lies_where_mlx_finds_it_by_a_word(folder, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_finds_programs", lambda: True)
    for binary in (b"another", b"program"):  # what lies there is never believed
        word = cuda_kernels.word_for("copy_1", binary)

    assert word == hashlib.sha256(b"program").hexdigest().encode()
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content == {"copy_1_ab.ptx": b"program", "copy_1_ab.txt": b"copy_1\tcopy_1\n"}


def test_where_mlx_does_not_find_programs_it_is_given_them(folder, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_finds_programs", lambda: False)

    assert cuda_kernels.word_for("copy_1", b"program") == b"program"
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_done_without(folder, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_finds_programs", lambda: True)
    folder.write_text("a file")

    assert cuda_kernels.word_for("copy_1", b"program") == b"program"


@pytest.mark.parametrize("value", [7, 0, RuntimeError("no kernel image")])
def test_programs_are_found_if_one_ran(folder, mlx, monkeypatch, value):
    def run(**given):
        assert given["compiled_source"] == hashlib.sha256(b"program").hexdigest().encode()
        if isinstance(value, Exception):
            raise value
        return [mx.array([value])]

    monkeypatch.undo()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder))
    monkeypatch.setattr(cuda_kernels, "compiled", lambda text: b"program")
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run)
    cuda_kernels._finds_programs.cache_clear()

    assert cuda_kernels._finds_programs() is (value == 7)

    cuda_kernels._finds_programs.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has CUDA here")
def test_words_are_hashed_as_the_standard_library_does():
    # `std::hash<std::string>` of libstdc++ on a 64-bit machine, printed by a program in C++.
    assert cuda_kernels._hash(b"word") == 0x8B2F30AD46B3E737
    assert cuda_kernels._hash(b"0123456789abcdef0") == 0x37B1A20C7C6AD6E8


def test_without_nvrtc_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_nvrtc_path", lambda: None)
    cuda_kernels._nvrtc.cache_clear()
    cuda_kernels._headers.cache_clear()

    assert cuda_kernels.compiled("") is None

    cuda_kernels._nvrtc.cache_clear()
    cuda_kernels._headers.cache_clear()


class _Nvrtc:
    """A library whose functions give these results; 0 is success."""

    def __init__(self, **results):
        self.results, self.called = results, []

    def __getattr__(self, name):
        def call(*arguments):
            self.called.append(name)
            if name == "nvrtcGetCUBINSize":
                arguments[1]._obj.value = 6
            if name == "nvrtcGetCUBIN":
                arguments[1].raw = b"binary"
            return self.results.get(name, 0)

        return call


def test_a_binary_is_what_nvrtc_made():
    library = _Nvrtc()

    assert cuda_kernels._compiled(library, "text", ["-a"]) == b"binary"

    assert library.called[-1] == "nvrtcDestroyProgram"


@pytest.mark.parametrize(
    "step", ["nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"]
)
def test_no_step_that_fails_gives_a_binary(step):
    assert cuda_kernels._compiled(_Nvrtc(**{step: 6}), "text", ["-a"]) is None
