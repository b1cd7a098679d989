"""Reads a config.json key by key; nothing is guessed, and every refusal names the key."""

from collections.abc import Mapping
from typing import Any, NoReturn

from dspark_batch.errors import ModelError


class ConfigReader:
    """A parsed config.json and where it came from.

    Args:
        config: the file's content, or a part of it.
        where: the file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.content, self.where = config, where

    def refuse(self, reason: str) -> NoReturn:
        """Raise the one sentence that says why this checkpoint is not used."""
        raise ModelError(f"{self.where}: {reason} Name another --drafter, or use --draft-length 0.")

    def get(self, key: str, default: object = None) -> Any:  # noqa: ANN401  JSON
        """Read a key that may be missing or null."""
        value = self.content.get(key)
        return default if value is None else value

    def required(self, key: str) -> Any:  # noqa: ANN401  JSON
        """Read a key that must be there."""
        if self.content.get(key) is None:
            raise ModelError(
                f"{self.where} has no {key}: this is not a whole drafter config. "
                "Download the checkpoint again, or name another --drafter."
            )
        return self.content[key]

    def count(self, key: str, least: int = 1) -> int:
        """Read a required whole number."""
        value = self.required(key)
        if type(value) is not int or value < least:
            self.refuse(f"{key} is {value!r}, expected a whole number from {least}.")
        return value

    def flag(self, key: str) -> bool:
        """Read a required true or false."""
        value = self.required(key)
        if type(value) is not bool:
            self.refuse(f"{key} is {value!r}, expected true or false.")
        return value

    def one_of(self, key: str, *known: str, default: str | None = None) -> str:
        """Read a name out of a few; required if there is no default."""
        value = self.required(key) if default is None else self.get(key, default)
        if value not in known:
            self.refuse(f"{key} is {value!r}, expected {' or '.join(known)}.")
        return value

    def part(self, key: str) -> "ConfigReader":
        """Read a required nested object."""
        value = self.required(key)
        if not isinstance(value, Mapping):
            self.refuse(f"{key} is {value!r}, expected an object.")
        return ConfigReader(value, f"{self.where}, {key}")
