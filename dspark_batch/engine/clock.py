"""Where the time of the engine goes."""

import time


class Clock:
    """Splits the engine's time, from the end of one round to the end of the next.

    Attributes:
        round_s: seconds in rounds.
        prefill_s: seconds that rounds took longer than the one before because prompts went along.
        idle_s: seconds in which the host prepared rounds; the device was idle in them at most.
        rounds: of the engine.
        slot_rounds: of all slots that were not free.
        prompt_tokens: that went through the target.
    """

    def __init__(self) -> None:
        self.round_s = self.prefill_s = self.idle_s = 0.0
        self.rounds = self.slot_rounds = self.prompt_tokens = 0
        self._usual_s = 0.0  # of a round without prompts
        self._has_prompts = False
        self._began = time.perf_counter()

    def begin(self) -> None:
        """The host begins to prepare a round."""
        self._began = time.perf_counter()
        self._has_prompts = False

    def add_prompts(self) -> None:
        """Prompts go along."""
        self._has_prompts = True

    def launch(self, num_active: int) -> None:
        """The device gets the round."""
        self.idle_s += time.perf_counter() - self._began
        self.rounds += 1
        self.slot_rounds += num_active

    def wait(self) -> None:
        """There was no round."""
        if self._has_prompts:
            self.prefill_s += time.perf_counter() - self._began

    def end(self) -> None:
        """The round is over."""
        total = time.perf_counter() - self._began
        if not self._has_prompts:
            self._usual_s = total
        self.round_s += min(total, self._usual_s)
        self.prefill_s += max(0.0, total - self._usual_s)
