"""Quantises weights while they load, so that a step has fewer bytes to read."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import quantize_model

from dspark_batch import device
from dspark_batch.errors import ModelError, UsageError
from dspark_batch.models.config_reader import ConfigReader
from dspark_batch.numerics.arrays import named_arrays

BITS = (2, 3, 4, 5, 6, 8)  # what MLX knows
GROUP_SIZE = 64  # weights that share a scale and a bias
_SMALL_BYTES = 256 << 20  # below this a drafter's weights are not what its time goes to


def check_bits(option: str, bits: int | None) -> None:
    """Refuse a number of bits that MLX does not know.

    Raises:
        UsageError: naming the option.
    """
    if bits is not None and bits not in BITS:
        known = ", ".join(map(str, BITS))
        raise UsageError(f"{option} is {bits}, expected one of {known}, or none to keep them.")


def default_drafter_bits(drafter: nn.Module) -> int | None:
    """Choose the bits of a drafter whose user named none: 4 on an Apple GPU, else as stored.

    Elsewhere MLX multiplies quantised weights slower than plain ones (benchmarks/LOG.md), and a
    small drafter gains nothing anywhere.
    """
    size = sum(array.nbytes for _, array in named_arrays(drafter))
    gains = _on_apple_gpu() and size > _SMALL_BYTES and described(drafter) is None
    return 4 if gains else None


def quantise_target(
    model: nn.Module, bits: int | None, config: Mapping[str, Any], directory: Path
) -> None:
    """Quantise a target as mlx-lm converts one; None leaves it as it is.

    Raises:
        ModelError: it is stored quantised otherwise.
    """
    if bits is None or _is_quantised(model, bits, "--target-bits", directory):
        return
    with redirect_stdout(io.StringIO()):  # it prints the bits per weight
        quantize_model(model, dict(config), GROUP_SIZE, bits)


def quantise_drafter(drafter: nn.Module, bits: int | None, directory: Path) -> None:
    """Quantise the matrices of a drafter; norms and the confidence head stay as they are.

    Raises:
        ModelError: it is stored quantised otherwise.
    """
    if bits is None or _is_quantised(drafter, bits, "--drafter-bits", directory):
        return
    nn.quantize(drafter, GROUP_SIZE, bits, class_predicate=is_large_matrix)


def prepare_as_stored(drafter: nn.Module, read: ConfigReader, names: Mapping[str, Any]) -> None:
    """Give a drafter the quantised layers for which a checkpoint has scales, as MLX writes them.

    Args:
        drafter: with no weights yet.
        read: its config, which says how the layers are quantised.
        names: of the checkpoint's tensors.
    """
    if read.get("quantization") is None:
        return
    stored = read.part("quantization")
    nn.quantize(
        drafter,
        stored.count("group_size"),
        stored.count("bits"),
        mode=stored.one_of("mode", "affine", default="affine"),
        class_predicate=lambda path, module: f"{path}.scales" in names,
    )


def described(module: nn.Module) -> str | None:
    """Say how a module's layers are quantised, as `4 bits/64 affine`; None: they are not."""
    kinds = {
        f"{layer.bits} bits/{layer.group_size} {layer.mode}"
        for layer in module.modules()
        if hasattr(layer, "bits")
    }
    return ", ".join(sorted(kinds)) or None


def is_large_matrix(path: str, module: nn.Module) -> bool:
    """Whether a layer of a drafter is quantised: its rows are whole groups, and it is no head."""
    fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0
    return fits and not path.startswith("confidence_head")


def _on_apple_gpu() -> bool:
    return device.is_metal()


def _is_quantised(module: nn.Module, bits: int, option: str, directory: Path) -> bool:
    stored = described(module)
    if stored is not None and not stored.startswith(f"{bits} bits"):
        raise ModelError(
            f"{directory}: the weights are stored with {stored}, and {option} asks for {bits}. "
            f"Leave out {option}, or name a checkpoint that is not quantised."
        )
    return stored is not None
