"""Loads a target and its drafter, and checks that they fit."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dspark_batch.models  # noqa: F401  isort: skip  before transformers

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes as get_model_classes
from mlx_lm.utils import load_config, load_model

from dspark_batch import device
from dspark_batch.drafters.calibration import kept_temperatures
from dspark_batch.drafters.drafter import DRAFTING, Drafter
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.drafters.few_tokens import DRAFT_TOKENS
from dspark_batch.drafters.packaging import load_drafter
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.drafters.sharing import share_ends
from dspark_batch.errors import ModelError, UsageError, is_out_of_memory
from dspark_batch.models.activations import make_activations_fast
from dspark_batch.models.checkpoint import check_files, digest, finiteness, read_config, settle
from dspark_batch.models.hub import Checkpoint, OnDownload, locate
from dspark_batch.models.joined_layers import join_draft_layers
from dspark_batch.models.number_type import DTYPES, set_dtype, usual_dtype
from dspark_batch.models.pairs import DEFAULT_FAMILY, known_pair
from dspark_batch.models.quantisation import (
    check_bits,
    default_drafter_bits,
    described,
    quantise_drafter,
    quantise_target,
)
from dspark_batch.models.rotations import share_angles
from dspark_batch.models.safe_layers import make_rows_safe
from dspark_batch.models.target import (
    PairConfig,
    Target,
    TargetFacts,
    by_itself,
    context_length_of,
    ends_of,
    for_mlx_lm,
    text_config,
)
from dspark_batch.models.tokenizer import Tokenizer, read_tokenizer

_FILES = ("model*.safetensors", "config.json")
_TARGET_FILES = (*_FILES, "generation_config.json")
_DRAFTER_FILES = (*_FILES, DRAFT_TOKENS)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja")
_MISSING_KEYS = re.compile(r"missing \d+ required positional arguments?: (.+)")
_PROBE_TOKENS = 8
# What mlx-lm raises at a config or at tensors that are not what its code expects.
_UNLOADABLE = (
    AttributeError,
    FileNotFoundError,
    LookupError,
    RuntimeError,
    SystemExit,  # of a family that needs a package more
    TypeError,
    ValueError,
)


class Pair(NamedTuple):
    """A resident target and its drafter."""

    target: Target
    tokenizer: Tokenizer | None  # None: the target's directory has none
    drafter: Drafter
    config: PairConfig

    @property
    def reader(self) -> Tokenizer:
        """The tokenizer, where text must be read.

        Raises:
            ModelError: there is none.
        """
        if self.tokenizer is None:
            raise ModelError(
                "the target has no tokenizer, so it cannot read a prompt; name another."
            )
        return self.tokenizer


def load_pair(  # noqa: PLR0913  the names that users of this method know
    family: str | None = None,
    *,
    target: str | None = None,
    drafter: str | None = None,
    dtype: str | None = None,
    drafter_bits: int | Literal["auto"] | None = "auto",
    target_bits: int | None = None,
    trust_remote_code: bool = False,
    on_download: OnDownload | None = None,
) -> Pair:
    """Load a target and its drafter.

    Args:
        family: a name in the registry; the default is the bundled pair, unless `target` is given.
        target: a directory, ORG/NAME or ORG/NAME@REVISION on the Hub, instead of the family's.
        drafter: the same for the drafter; a target of your own without one decodes plainly.
        dtype: "float32", "bfloat16" or "float16"; None: float32 on a CPU for models
            that are not large, else as stored.
        drafter_bits: quantise the drafter to 2, 3, 4, 5, 6 or 8 bits; None keeps it as it is
            stored; "auto" means 4 for a drafter of real size on an Apple GPU, and None elsewhere.
        target_bits: quantise the target while it loads; None keeps it as it is stored.
        trust_remote_code: let a target run Python code of its own; a drafter never does.
        on_download: told how far a download is; None leaves that to the Hub's own progress bars.

    Raises:
        ModelError: something is missing, damaged, unsupported, or does not fit.
        UsageError: the family is unknown, or a number of bits.
    """
    check_bits("--target-bits", target_bits)
    check_bits("--drafter-bits", None if drafter_bits == "auto" else drafter_bits)
    device.keep_memory_free()
    family, target, drafter = _names(family, target, drafter)
    found = locate(target, with_code=trust_remote_code, on_download=on_download)
    drafts = locate(drafter, on_download=on_download) if drafter else None

    model, config = _load_target(found.directory, trust_remote_code)
    facts = _facts(model, config, found.directory)
    dtype = dtype or usual_dtype(model, is_to_be_quantised=target_bits is not None)
    set_dtype(model, DTYPES[dtype])
    finite = finiteness(model)
    quantise_target(model, target_bits, config, found.directory)
    trained: DSparkDrafter | None = None
    if drafts:  # a drafter that does not fit is refused before the target's weights are read
        trained = load_drafter(drafts.directory, facts, ends_of(model))
    settle(model, finite, found.directory)
    if trained is not None and drafts:
        bits = default_drafter_bits(trained) if drafter_bits == "auto" else drafter_bits
        _settle_drafter(trained, model, dtype, bits, drafts.directory)
    make_rows_safe(model)
    make_activations_fast(model)
    share_angles(model)

    tokenizer = _read_tokenizer(found.directory, config, trust_remote_code)
    identity = _identity(found, drafts, tokenizer, dtype) | {
        "target_bits": described(model),
        "drafter_bits": described(trained) if trained is not None else None,
        "drafting": DRAFTING,
    }
    temperatures = kept_temperatures(identity)
    pair_config = PairConfig(
        family=family,
        dtype=dtype,
        context_length=facts.context_length,
        stop_ids=tokenizer.stop_ids if tokenizer else _stop_ids(config),
        identity=identity | {"calibration": str(temperatures) if temperatures else None},
        confidence_temperatures=temperatures,
    )
    used: Drafter = NoDrafter() if trained is None else trained
    tapped = _tap(model, used.tap_ids, pair_config, found.directory)
    return Pair(tapped, tokenizer, used, pair_config)


class Reading(NamedTuple):
    """What a pair makes of a prompt, known without its weights."""

    tokenizer: Tokenizer
    context_length: int  # most positions of prompt and answer together
    identity: dict[str, str | None]  # of the tokenizer and its template, as `PairConfig` has them
    weight_bytes: int | None  # of target and drafter on the disk; None: not all of it is here
    # Bytes that the target's cache takes for a position, and for a slot besides; None: unknown.
    cached_bytes: tuple[int, int] | None


def load_reading(
    family: str | None = None,
    *,
    target: str | None = None,
    drafter: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Reading:
    """Load only the tokenizer and the configs of a pair; the arguments are those of `load_pair`.

    Without a dtype its cache is told in 16 bits.

    Raises:
        ModelError: something is missing, or the target has no tokenizer.
        UsageError: the family is unknown.
    """
    _, target, drafter = _names(family, target, drafter)
    found = locate(target, with_code=trust_remote_code, with_weights=False)
    config = read_config(found.directory)
    _check_code(config, found.directory, trust_remote_code)
    length, cached_bytes = _told_by_config(config, found.directory, dtype or "bfloat16")
    tokenizer = _read_tokenizer(found.directory, config, trust_remote_code)
    if tokenizer is None:
        raise ModelError(f"{target}: has no tokenizer, so it cannot read a prompt; name another.")
    names = [target, *([drafter] if drafter else [])]
    return Reading(
        tokenizer,
        length,
        _reading_identity(found.directory, tokenizer),
        _weight_bytes([locate(name, with_weights=False).directory for name in names]),
        cached_bytes,
    )


def _weight_bytes(directories: list[Path]) -> int | None:
    sizes = [[p.stat().st_size for p in d.glob("model*.safetensors")] for d in directories]
    return sum(map(sum, sizes)) if all(sizes) else None


def _names(
    family: str | None, target: str | None, drafter: str | None
) -> tuple[str | None, str, str | None]:
    """Settle which family, target and drafter are meant."""
    if family is None and target is None:
        if drafter is not None:
            raise UsageError(
                "--drafter needs the --target that it drafts for, or its --family, such as tiny."
            )
        family = DEFAULT_FAMILY
    known = known_pair(family) if family is not None else None
    if target is not None or known is None:
        return family, str(target), drafter
    return family, known.target, drafter or known.drafter


def _settle_drafter(
    drafter: DSparkDrafter, model: nn.Module, dtype: str, bits: int | None, directory: Path
) -> None:
    """Bring a drafter into memory, without what it can share with the target."""
    drafter.set_dtype(DTYPES[dtype])
    finite = finiteness(drafter)
    share_ends(drafter, model)
    quantise_drafter(drafter, bits, directory)
    settle(drafter, finite, directory)
    make_rows_safe(drafter)  # the rejection rule reads its logits
    share_angles(drafter, is_drafter=True)
    join_draft_layers(drafter.layers, drafter.norm)


def _load_target(directory: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    stored = read_config(directory)
    _check_code(stored, directory, trust_remote_code)
    check_files(directory)  # a clear sentence, before mlx-lm's own
    with _refused(directory):
        model, _ = load_model(
            directory,
            lazy=True,
            model_config=for_mlx_lm(stored),
            trust_remote_code=trust_remote_code,
        )
        return model, load_config(directory)


def _told_by_config(
    config: dict[str, Any], directory: Path, dtype: str
) -> tuple[int, tuple[int, int] | None]:
    """Build a target as mlx-lm does, compute nothing, and refuse what a run refuses.

    Returns:
        Its context length, and the bytes of its cache as `Reading` has them.
    """
    if config.get("model_file"):  # its own code says what it is, and runs only with the weights
        return context_length_of(config), None
    with _refused(directory):
        whole = config | for_mlx_lm(config)
        model_class, args_class = get_model_classes(whole)
        model = model_class(args_class.from_dict(whole))
    length = _facts(model, config, directory).context_length
    set_dtype(model, DTYPES[dtype])
    try:
        return length, Target(model).cached_bytes()
    except _UNLOADABLE:  # its passes are refused when a run begins
        return length, None


@contextmanager
def _refused(
    directory: Path, problem: str = "mlx-lm cannot load it", advice: str = "Download it again"
) -> Iterator[None]:
    """Put what mlx-lm cannot do with a target in a sentence."""
    try:
        yield
    except _UNLOADABLE as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{directory}: {problem} as a target ({_reason(error)}). "
            f"{advice}, or name another --target."
        ) from error


def _facts(model: nn.Module, config: dict[str, Any], directory: Path) -> TargetFacts:
    try:
        return TargetFacts.of(model, config)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error


def _check_code(config: dict[str, Any], directory: Path, trusted: bool) -> None:
    """Refuse a target that wants to run Python code of its own, unless the user trusts it."""
    for key in ("model_file", "auto_map"):
        if config.get(key) and not trusted:
            raise ModelError(
                f"{directory / 'config.json'}: {key} asks to run Python code of the checkpoint, "
                "and nothing of it was run. Read the code, then add --trust-remote-code; or name "
                "another --target."
            )


def _reason(error: BaseException) -> str:
    """Put mlx-lm's message on one line; it lists tensors line by line."""
    if missing := _MISSING_KEYS.search(str(error)):
        return f"config.json has no {missing[1]}"
    if isinstance(error, KeyError) and "." not in str(error):
        return f"config.json has no {error}"
    return textwrap.shorten(" ".join(str(error).split()), 200) or type(error).__name__


def _tap(model: nn.Module, tap_ids: tuple[int, ...], config: PairConfig, directory: Path) -> Target:
    """Tap a target, and check that it still computes what it computed."""
    tokens = mx.arange(_PROBE_TOKENS)[None] + 1
    with _refused(directory, "mlx-lm cannot run it here", "Try --dtype float32"):
        plain = by_itself(model, tokens)
        mx.eval(plain)
    target = Target(model, tap_ids, config)
    with _refused(directory, "its layers cannot be read", "Leave --drafter out"):
        tapped, features = target.by_itself(tokens)
    size = len(tap_ids) * target.facts.hidden_size
    if features is not None and features.shape != (*tokens.shape, size):
        raise ModelError(
            f"{directory}: its layers {list(tap_ids)} give features {list(features.shape)}, "
            f"expected {[*tokens.shape, size]}. No drafter can read this target; leave --drafter "
            "out, or name another --target."
        )
    if not mx.array_equal(plain, tapped):
        raise ModelError(
            f"{directory}: its logits change when its layers {list(tap_ids)} are read, expected "
            "the same bits. This mlx-lm does not fit; install the version that we pin."
        )
    return target


def _read_tokenizer(
    directory: Path, config: dict[str, Any], trust_remote_code: bool
) -> Tokenizer | None:
    if not any(directory.glob("tokenizer*")):
        return None
    return read_tokenizer(
        directory, config.get("eos_token_id"), trust_remote_code=trust_remote_code
    )


def _stop_ids(config: dict[str, Any]) -> frozenset[int]:
    ids = config.get("eos_token_id", text_config(config).get("eos_token_id"))
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _reading_identity(directory: Path, tokenizer: Tokenizer | None) -> dict[str, str | None]:
    return {
        "tokenizer": digest(directory, *_TOKENIZER_FILES),
        "chat_template": tokenizer.chat_template if tokenizer else None,
    }


def _identity(
    target: Checkpoint, drafter: Checkpoint | None, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, str | None]:
    return {
        "target": digest(target.directory, *_TARGET_FILES),
        "target_source": target.source,
        **_reading_identity(target.directory, tokenizer),
        "dtype": dtype,
        "drafter": digest(drafter.directory, *_DRAFTER_FILES) if drafter else None,
        "drafter_source": drafter.source if drafter else None,
    }
