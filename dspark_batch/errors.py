"""Everything that ends a run, and the exit code it ends with.

DsparkBatchError           70  an error of ours
├── UsageError              2  an option, the job file, an input path
├── ModelError              2  a checkpoint that is missing, damaged or does not fit
├── EqualityError           3  two outputs that must be equal are not
├── ResumeMismatch          4  the run directory holds another job
├── OutputInUse             5  another run holds the output
├── JournalError            2  the journal was damaged by something other than a crash
└── Resumable              75  stopped early; the same command continues

What breaks one item is no exception: it is a `types.Failure`.
"""

_OUT_OF_MEMORY = (
    *("out of memory", "insufficient memory"),
    *("unable to allocate", "attempting to allocate", "bad_alloc"),
)


class DsparkBatchError(Exception):
    """Base of all; the message says where, what was expected and found, and what to do."""

    exit_code = 70


class UsageError(DsparkBatchError):
    """The command, the job file or an input path asks for something impossible."""

    exit_code = 2


class ModelError(DsparkBatchError):
    """A checkpoint is missing, damaged, unsupported, or does not fit its pair."""

    exit_code = 2


class EqualityError(DsparkBatchError):
    """Two outputs that must be equal are not."""

    exit_code = 3


class ResumeMismatch(DsparkBatchError):
    """The run directory holds another job."""

    exit_code = 4


class OutputInUse(DsparkBatchError):
    """Another run holds the output."""

    exit_code = 5


class JournalError(DsparkBatchError):
    """The journal holds something that no crash of ours can have left."""

    exit_code = 2


class Resumable(DsparkBatchError):
    """The run stopped early with the journal whole; the same command continues."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Tell MLX's ways of saying it, which depend on the backend, from other errors."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
    )
