"""Our CUDA kernels: compiled by NVRTC directly, or, where that is not there, by MLX.

MLX puts headers before every kernel of ours that take NVRTC some 3 s to read, in every process and
for every kernel. Ours need one of CUDA's own, which takes a tenth of a second.
"""

import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

Kernel: TypeAlias = Callable[..., list[mx.array]]

_TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.float32: "float",
    mx.int32: "int",
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
    """

    def __init__(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], *, header: str, source: str
    ) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs
        self._header = f"#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n{header}"
        self._source, self._sizes = source, sorted(set(_SIZE.findall(source)))
        made: Any = mx.fast.cuda_kernel(
            name=name,
            input_names=inputs,
            output_names=outputs,
            header=self._header,
            source=source,
        )
        self._by_mlx: Kernel = made
        self._compiled: dict[str, bytes | None] = {}  # by what the kernel begins with

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, int | bool | mx.Dtype]] = (),
    ) -> list[mx.array]:
        """Run over arrays; see `mx.fast.cuda_kernel`."""
        dtypes = [*(each.dtype for each in inputs), *output_dtypes]
        beginning = self._beginning(dtypes, template)
        if beginning not in self._compiled:
            self._compiled[beginning] = compiled(self._text(beginning))
        found = self._compiled[beginning]
        if found is None:
            return self._by_mlx(
                inputs=inputs,
                template=template,
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
            )
        by_name = dict(zip(self._inputs, inputs, strict=True))
        return mx.fast.precompiled_cuda_kernel(
            name=self._full_name(beginning),
            compiled_source=found,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[by_name[name].shape[int(axis)] for name, axis in self._sizes],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    def _full_name(self, beginning: str) -> str:
        return f"{self._name}_{hashlib.sha256(beginning.encode()).hexdigest()[:16]}"

    def _text(self, beginning: str) -> str:
        body = _SIZE.sub(r"\1_shape_\2", self._source)
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
            *(f"int {name}_shape_{axis}" for name, axis in self._sizes),
        ]
        fixed = [
            f"using {name} = {_TYPES[what]};"
            if isinstance(what, mx.Dtype)
            else f"constexpr {'bool' if isinstance(what, bool) else 'int'} {name} = {int(what)};"
            for name, what in template
        ]
        return f"({', '.join(takes)}) {{\n{chr(10).join(fixed)}\n"


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
