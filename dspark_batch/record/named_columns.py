"""Columns that the options name: a name that no record has is a mistake, found before any work."""

from collections.abc import Iterator, Mapping

from dspark_batch.errors import UsageError
from dspark_batch.intake.choices import CHOICES, COLUMN, OTHER_WORDS
from dspark_batch.intake.files import Wanted
from dspark_batch.intake.messages import listed
from dspark_batch.intake.question import BODY, CONVERSATIONS, TURNS, has_question
from dspark_batch.intake.template import ALL, columns_in
from dspark_batch.record.rows import layout_of
from dspark_batch.spec.nearest import nearest
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Json

_SUGGESTIONS = {
    **dict.fromkeys(("system", "system_prompt"), "--system-column"),
    **dict.fromkeys(("uuid", "guid", "uid", "_id", "prompt_id", "question_id"), "--id-column"),
    **dict.fromkeys(("message_id", "conversation_id", "example_id"), "--id-column"),
    **dict.fromkeys(("sample_id", "task_id", "problem_id", "instruction_id"), "--id-column"),
    **dict.fromkeys((*CHOICES, *OTHER_WORDS), COLUMN),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "text"),
}
_PROMPTS = ("prompt_column", "messages_column")
_KNOWN = (
    "custom_id",
    "id",
    "method",
    "url",
    COLUMN,
    "chat_template_kwargs",
    "tools",
    "functions",
)  # asked by their own names


class NamedColumns:
    """Looks at every record for what the options name."""

    def __init__(self, spec: Spec) -> None:
        """Remember what to look for.

        Raises:
            UsageError: the template is not Jinja.
        """
        self._spec = spec
        self._unseen = dict(_named(spec))  # column -> the option that names it
        self._has_prompt = spec.template is not None
        self._first: Mapping[str, Json] = {}  # the first record that has columns
        self._has_names = spec.id_column is not None
        self._suggested: dict[str, str] = {}  # column -> the option that could name it

    def see(self, record: Mapping[str, Json], *, is_whole: bool = True) -> None:
        """Look at the columns of one record; one that is not whole may have had more."""
        if is_whole:
            self._first = self._first or record
        self._has_prompt = self._has_prompt or has_question(record, self._spec)
        self._has_names |= not record.keys().isdisjoint(("custom_id", "id"))
        for column in _SUGGESTIONS.keys() & record.keys() - self._suggested.keys():
            if _suggests(record[column], _SUGGESTIONS[column]):
                self._suggested[column] = _SUGGESTIONS[column]
        for column in self._unseen.keys() & record.keys():
            del self._unseen[column]

    def hints(self) -> tuple[str, ...]:
        """Say which options the columns suggest, and which columns do less than they seem to."""
        asks_system = self._spec.system_column is not None or self._spec.template is not None
        settled = {
            "--id-column": self._has_names,
            "--system-column": asks_system,
            COLUMN: False,
            "text": self._spec.template is not None,
        }
        said = {
            "--id-column": "no record has a custom_id or an id; `{0}` could name them: {1} {0}",
            "--system-column": "the column `{0}` is not asked; it is a system prompt with {1} {0}",
            COLUMN: "the column `{0}` is not obeyed; a record's own settings stand in `{1}`",
            "text": "the column `{0}` is not asked; the model reads only {1}",
        }
        return tuple(
            said[option].format(column, option)
            for column, option in sorted(self._suggested.items())
            if not settled[option]
        )

    def check(self, where: str) -> None:
        """Refuse a name that no record had, unless there were no records to look at.

        Raises:
            UsageError: naming the option, and the column that was probably meant.
        """
        if not self._first:
            return
        columns = f"columns are {listed(self._first)}"
        for column, option in self._unseen.items():
            raise UsageError(
                f"{option} names a column `{column}` that no record of {where} has"
                f"{nearest(column, self._first)}; {columns}."
            )
        if not self._has_prompt:
            raise UsageError(
                f"{where}: no record has a `{self._spec.prompt_name}`, or another known shape of "
                f"a prompt; {columns}; name the right one with --prompt-column or "
                "--messages-column."
            )


def wanted_columns(spec: Spec) -> Wanted:
    """Say what a job wants of the columns of its inputs."""
    names = {*_KNOWN, spec.report_by} | columns_in(spec.template or "")
    names |= {spec.system_column, spec.id_column, spec.score}
    if spec.template is None:
        names |= {spec.prompt_name, spec.messages_name, *CONVERSATIONS, TURNS, BODY}
    asks_any = ALL in (spec.template or "")  # all columns at once, so any of them
    layout = layout_of(spec)
    return Wanted(
        asks=lambda column: asks_any or column in names,
        passes=lambda column: spec.format == "rows" and layout.has(column),
        id_column=spec.id_column,
    )


def _suggests(value: Json, what: str) -> bool:
    """Whether a column holds what its name promises."""
    if what == COLUMN:
        return value is not None and not isinstance(value, bool | dict)
    return bool(value) and (what == "text" or isinstance(value, str | int))


def _named(spec: Spec) -> Iterator[tuple[str, str]]:
    for name in ("prompt_column", "messages_column", "system_column", "id_column"):
        is_read = spec.template is None or name not in _PROMPTS
        if is_read and getattr(spec, name) is not None:
            yield getattr(spec, name), f"--{name.replace('_', '-')}"
    if spec.score is not None:
        yield spec.score, "--score"
    for column in columns_in(spec.template or ""):
        yield column, "--template"
    for name in ("keep", "drop"):
        for column in getattr(spec, name):
            yield column, f"--{name}"
