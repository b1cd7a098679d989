"""Our CUDA kernels: compiled by NVRTC directly, or, where that is not there, by MLX.

MLX puts headers before every kernel of ours that take NVRTC some 3 s to read, in every process and
for every kernel. Ours need one of CUDA's own, which takes a tenth of a second.

Numbers go along as arguments. In a small array a number lies in the host's memory, where MLX makes
it, and every block of threads waits for it.

MLX hashes the program that it is given at every launch, which takes longer than the launch. So it
is given a word for it, and finds the program in its folder of what it compiled.
"""

import ctypes
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import mlx.core as mx

Kernel: TypeAlias = Callable[..., list[mx.array]]

_TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.bool_: "bool",
}
_SIZE = re.compile(r"\b(\w+)_shape\[(\d+)\]")


class CudaKernel:
    """A kernel of ours, called as one of `mx.fast.cuda_kernel`, and compiled when it runs first.

    Args:
        name: names the source, too: nothing else is called so.
        inputs: names of what it reads, contiguous; `NAME_shape[i]` is a size of one.
        outputs: names of what it writes.
        header: CUDA source of what it calls.
        source: the body of the kernel.
        numbers: that go along, by name whether "int" or "float".
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        header: str,
        source: str,
        numbers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs
        self._numbers = numbers
        self._header = f"#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n{header}"
        self._source, self._sizes = source, sorted(set(_SIZE.findall(source)))
        made: Any = mx.fast.cuda_kernel(
            name=name,
            input_names=[*inputs, *self._listed],
            output_names=outputs,
            header=self._header,
            source="".join(self._unpacked()) + source,
        )
        self._by_mlx: Kernel = made
        self._compiled: dict[str, bytes | None] = {}  # by what the kernel begins with

    def __call__(  # noqa: PLR0913  what a kernel runs over
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, int | bool | mx.Dtype]] = (),
        numbers: Mapping[str, float] = MappingProxyType({}),
    ) -> list[mx.array]:
        """Run over arrays and numbers; see `mx.fast.cuda_kernel`."""
        dtypes = [*(each.dtype for each in inputs), *output_dtypes]
        beginning = self._beginning(dtypes, template)
        if beginning not in self._compiled:
            binary = compiled(self._text(beginning))
            name = self._full_name(beginning)
            self._compiled[beginning] = None if binary is None else word_for(name, binary)
        found = self._compiled[beginning]
        if found is None:
            return self._by_mlx(
                inputs=[*inputs, *self._lists(numbers)],
                template=template,
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
            )
        by_name = dict(zip(self._inputs, inputs, strict=True))
        sizes = [by_name[name].shape[int(axis)] for name, axis in self._sizes]
        return mx.fast.precompiled_cuda_kernel(
            name=self._full_name(beginning),
            compiled_source=found,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[*map(_as_int, self._told(numbers).values()), *sizes],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    @property
    def _listed(self) -> list[str]:
        """Name the arrays in which numbers go along where MLX compiles."""
        return [f"{what}s" for what in ("int", "float") if what in self._numbers.values()]

    def _unpacked(self) -> Iterator[str]:
        for kind in self._listed:
            names = [name for name, what in self._numbers.items() if f"{what}s" == kind]
            for at, name in enumerate(names):
                yield f"const {kind[:-1]} {name} = {kind}[{at}];\n"

    def _told(self, numbers: Mapping[str, float]) -> dict[str, float]:
        kinds = {"int": int, "float": float}
        return {name: kinds[what](numbers[name]) for name, what in self._numbers.items()}

    def _lists(self, numbers: Mapping[str, float]) -> list[mx.array]:
        told, dtypes = self._told(numbers), {"ints": mx.int32, "floats": mx.float32}
        return [
            mx.array([told[n] for n, what in self._numbers.items() if f"{what}s" == kind], dtype)
            for kind, dtype in dtypes.items()
            if kind in self._listed
        ]

    def _full_name(self, beginning: str) -> str:
        return f"{self._name}_{hashlib.sha256(beginning.encode()).hexdigest()[:16]}"

    def _text(self, beginning: str) -> str:
        floats = [
            f"const float {name} = __int_as_float({name}_bits);\n"
            for name, what in self._numbers.items()
            if what == "float"
        ]
        body = "".join(floats) + _SIZE.sub(r"\1_shape_\2", self._source)
        name = self._full_name(beginning)
        return f'{self._header}\nextern "C" __global__ void {name}{beginning}{body}\n}}\n'

    def _beginning(
        self, dtypes: Sequence[mx.Dtype], template: Sequence[tuple[str, int | bool | mx.Dtype]]
    ) -> str:
        """Say what the kernel takes, and what is fixed when it is compiled."""
        types = [_TYPES[dtype] for dtype in dtypes]
        number = len(self._inputs)
        takes = [
            *(f"const {t}* {n}" for t, n in zip(types[:number], self._inputs, strict=True)),
            *(f"{t}* {n}" for t, n in zip(types[number:], self._outputs, strict=True)),
            *(
                f"int {n}_bits" if what == "float" else f"int {n}"
                for n, what in self._numbers.items()
            ),
            *(f"int {name}_shape_{axis}" for name, axis in self._sizes),
        ]
        fixed = [
            f"using {name} = {_TYPES[what]};"
            if isinstance(what, mx.Dtype)
            else f"constexpr {'bool' if isinstance(what, bool) else 'int'} {name} = {int(what)};"
            for name, what in template
        ]
        return f"({', '.join(takes)}) {{\n{chr(10).join(fixed)}\n"


def _as_int(number: float) -> int:
    """Give a float32 by its bits: MLX 0.32 takes integers only."""
    if isinstance(number, int):
        return number
    (bits,) = struct.unpack("i", struct.pack("f", number))
    return int(bits)


def word_for(name: str, binary: bytes) -> bytes:
    """Lay a program where MLX finds it by a word; the program itself, where MLX does not.

    Args:
        name: of the one kernel in it, and of nothing else.
        binary: the program.
    """
    try:
        return _laid(name, binary) if _finds_programs() else binary
    except OSError:
        return binary


def _laid(name: str, binary: bytes) -> bytes:
    """Put a program into MLX's folder, whole or not at all; nothing there is ever believed.

    Source:
        MLX, `backend/cuda/custom_kernel.cpp` and `jit_module.cpp`.

    Raises:
        OSError: it cannot be written.
    """
    word = hashlib.sha256(binary).hexdigest().encode()
    home = Path(tempfile.gettempdir(), "mlx", version("mlx"), "ptx")
    folder = Path(os.environ.get("MLX_PTX_CACHE_DIR") or home)
    folder.mkdir(parents=True, exist_ok=True)
    key = f"{name}_{_hash(word):x}"
    for ending, content in (("txt", f"{name}\t{name}\n".encode()), ("ptx", binary)):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(content)
        Path(file.name).replace(folder / f"{key}.{ending}")
    return word


def _hash(word: bytes) -> int:
    """Hash as C++'s `std::hash` of a string does."""
    found: int = _hash_bytes()(word, len(word), 0xC70F6907)
    return found


@cache
def _hash_bytes() -> Callable[[bytes, int, int], int]:
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    function.restype = ctypes.c_size_t
    return function


@cache
def _finds_programs() -> bool:
    """Whether MLX finds a program by its word; tried with one that writes 7."""
    name = "dspark_batch_found"
    text = f'extern "C" __global__ void {name}(int* out) {{ out[0] = 7; }}'
    try:
        binary = compiled(text)
        if binary is None:
            return False
        (found,) = mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=_laid(name, binary),
            inputs=[],
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
            scalars=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
        return bool(found.item() == 7)
    except (OSError, AttributeError, RuntimeError):
        return False


def compiled(text: str) -> bytes | None:
    """Compile a program for the GPU by the NVRTC that MLX has loaded; None: it cannot be done."""
    library, folder = _nvrtc(), _headers()
    if library is None or folder is None:
        return None
    facts = mx.device_info()
    major, minor = (int(facts[f"compute_capability_{part}"]) for part in ("major", "minor"))
    return _compiled(library, text, [f"--gpu-architecture=sm_{major}{minor}", f"-I{folder}"])


def _compiled(library: ctypes.CDLL, text: str, options: Sequence[str]) -> bytes | None:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
    )
    if made != 0:
        return None
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given) != 0:
            return None
        if library.nvrtcGetCUBINSize(program, ctypes.byref(size)) != 0 or size.value == 0:
            return None
        binary = ctypes.create_string_buffer(size.value)
        return binary.raw if library.nvrtcGetCUBIN(program, binary) == 0 else None
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _nvrtc_path() -> Path | None:
    """Find the library that MLX has loaded; another version may compile to other bits."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if "/libnvrtc.so" in line)
    return next((Path(path) for path in paths), None)


@cache
def _nvrtc() -> ctypes.CDLL | None:
    path = _nvrtc_path()
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None


@cache
def _headers() -> Path | None:
    """Find CUDA's headers: those beside the library, or where MLX looks for them."""
    path = _nvrtc_path()
    homes = [] if path is None else list(path.parents[:4])
    homes += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes.append(Path("/usr/local/cuda"))
    places = (home / "include" for home in homes)
    return next((place for place in places if (place / "cuda_bf16.h").is_file()), None)
