"""Where the time of the engine goes."""

import time

_NO_WAIT_S = 2e-4  # a shorter wait found the device done


class Clock:
    """Splits the engine's time, from one wait for the device to the next.

    Attributes:
        round_s: seconds in rounds.
        prefill_s: seconds that rounds took longer than the one before because prompts went along.
        idle_s: seconds in which the device may have had nothing to do: until a round was launched,
            and behind a round that was over before the host was.
        rounds: of the engine.
        slot_rounds: of all slots that were not free.
    """

    def __init__(self) -> None:
        self.round_s = self.prefill_s = self.idle_s = 0.0
        self.rounds = self.slot_rounds = 0
        self._usual_s = 0.0  # of a round without prompts
        self._has_prompts = False
        self._began = self._launched = time.perf_counter()

    def begin(self) -> None:
        """The host begins the next round."""
        self._began = time.perf_counter()
        self._has_prompts = False

    def add_prompts(self) -> None:
        """Prompts go along."""
        self._has_prompts = True

    def launch(self, num_active: int) -> None:
        """The device has all of the round."""
        self._launched = time.perf_counter()
        self.rounds += 1
        self.slot_rounds += num_active

    def wait(self, since: float) -> None:
        """The round is over, for which the host had waited since then."""
        now = time.perf_counter()
        total = now - self._began
        was_late = now - since < _NO_WAIT_S
        self.idle_s += (since if was_late else self._launched) - self._began
        if not self._has_prompts:
            self._usual_s = total
        self.round_s += min(total, self._usual_s)
        self.prefill_s += max(0.0, total - self._usual_s)
