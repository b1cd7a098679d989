"""What a server was asked to be: every option is a field here, or one of the job's."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A server, resolved."""

    spec: Spec  # of all answers; inputs and output are each batch's own
    data_dir: Path  # files, and batches that survive a restart
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    names: tuple[str, ...] = ()  # of the model; (): as the pair was named
    keys: tuple[str, ...] = ()  # one of which a request must have; (): none
    no_auth: bool = False  # serve others without a key
    cors_origins: tuple[str, ...] = ()  # of pages whose scripts may ask
    live_slots: int | None = None  # kept free for live requests; None: an eighth of all
    max_waiting: int | None = None  # live requests without a slot; None: 4 for each slot
    max_body: int = 32 << 20  # bytes of a request
    max_file: int = 512 << 20  # bytes of an upload
    request_timeout: float | None = None  # seconds; None: no limit
    max_batch_requests: int = 50_000
    max_batch_bytes: int = 200 << 20
    retain_s: float | None = None  # after which files and finished batches go; None: never

    def __post_init__(self) -> None:
        if not (self.is_loopback or self.keys or self.no_auth):
            raise UsageError(
                f"--host {self.host}: other machines could ask without a key. Give --api-key-file "
                "or DSPARK_BATCH_API_KEY, or say --no-auth."
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which a request may ask for the model; answers have the first."""
        return self.names or (self.spec.model_name,)
