"""The rules by which tokens are drafted and accepted; a rule with noise lives for one round."""

from typing import Protocol

import mlx.core as mx

from dspark_batch.numerics.acceptance import accept_with_bonus, count_leading
from dspark_batch.numerics.among import Among
from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.sampling import Settings, draw, probabilities, scaled_logits
from dspark_batch.numerics.scores import Scores, score
from dspark_batch.numerics.steering import Steering


class Rule(Protocol):
    """What the engine asks of a rule."""

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens [B] from the target's logits [B, V]."""

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Choose the drafts [B] of block position k.

        Args:
            logits: the drafter's, [B, V]; [B, n] of a drafter that knows only some tokens.
            k: the position, from 0.
            among: these tokens; None: all.
        """

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Decide how many drafts stay and which token follows them.

        Args:
            drafts: [B, K] int32, the first K that `draft` chose.
            verify_len: [B] int32 in 0..K, how many of them count.
            logits: [B, K+1, V], the target's, after the anchor and after each draft.

        Returns:
            Accepted drafts [B] and the bonus tokens [B], int32.
        """


class Greedy:
    """Temperature 0: the most likely token, the lowest id among equals."""

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens; see `Rule`."""
        return mx.argmax(logits, axis=-1).astype(mx.int32)

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Choose the drafts of a block position; see `Rule`."""
        likeliest = mx.argmax(logits, axis=-1)
        return likeliest if among is None else among.named(likeliest)

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Accept what the target would have chosen itself; see `Rule`."""
        choice = mx.argmax(logits, axis=-1).astype(mx.int32)
        return accept_with_bonus(drafts, choice, verify_len)


class Coupled:
    """Greedy on logits with Gumbel noise that target and drafter share.

    The argmax of log p + Gumbel noise is an exact sample of p. The noise belongs to the answer
    position, so the answer is the same whoever drafts, and however much. A draft is accepted with
    probability (1 - TV(p, q)) / (1 + TV(p, q)) at least.

    Source:
        Daliri, Musco, Suresh: Coupling without communication and drafter-invariant speculative
        decoding (arXiv:2408.07978).
    """

    def __init__(self, settings: Settings, chance: Chance) -> None:
        self._settings = settings
        self._chance = chance

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens; see `Rule`."""
        return self.draft(logits, 0).astype(mx.int32)

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Choose the drafts of a block position; see `Rule`."""
        return Greedy().draft(self._noisy(logits[:, None], k, among)[:, 0], k, among)

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Accept what the target would have drawn itself; see `Rule`."""
        return Greedy().verify(drafts, verify_len, self._noisy(logits, 0))

    def _noisy(self, logits: mx.array, ahead: int, among: Among | None = None) -> mx.array:
        scaled, ids = scaled_logits(logits, self._settings), None if among is None else among.ids
        return self._chance.perturb(scaled, ahead, self._settings.is_sampled, ids)


class Rejection:
    """Accept a draft with probability min(1, p/q), else draw from what p has more than q.

    A draft stays with probability 1 - TV(p, q), the most that any rule reaches, but the answer
    depends on what was drafted.

    Source:
        Leviathan et al. 2023 (arXiv:2211.17192), Algorithm 1; DeepSpec's evaluator.
    """

    def __init__(self, settings: Settings, chance: Chance) -> None:
        self._settings = settings
        self._chance = chance
        self._proposals: list[mx.array] = []  # by block position: the q [B, V] that was drawn from

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens; see `Rule`."""
        p = probabilities(logits[:, None], self._settings)[:, 0]
        no_drafts = mx.zeros(logits.shape[0], dtype=mx.int32)
        return draw(p, self._chance.bonus_uniform(no_drafts))

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Draw the drafts of a block position and remember their distribution; see `Rule`."""
        logits = logits if among is None else among.spread(logits)
        q = probabilities(logits[:, None], self._settings)[:, 0]
        self._proposals.append(q)
        return draw(q, self._chance.draft_uniform(k))

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Accept by the ratio of probabilities, draw what follows; see `Rule`."""
        p = probabilities(logits, self._settings)
        # No draft is proposed for the last row: its residual is p itself.
        q = mx.stack([*self._proposals[: drafts.shape[1]], mx.zeros_like(p[:, 0])], axis=1)
        u = self._chance.accept_uniforms(drafts.shape[1])
        # u < p / q without the division; DeepSpec floors q at 1e-8, which would bias rarer drafts.
        accepts = u * _at(q[:, :-1], drafts) < _at(p[:, :-1], drafts)
        accepted = count_leading(accepts, verify_len)
        weights = _residual(_row(p, accepted), _row(q, accepted), accepted < verify_len)
        return accepted, draw(weights, self._chance.bonus_uniform(accepted))


class Steered:
    """A rule over logits that requests have changed: the drafter's and the target's alike.

    Lives for one round, as it remembers the drafts.
    """

    def __init__(self, rule: Rule, steering: Steering) -> None:
        self._rule = rule
        self._steering = steering
        self._drafts: list[mx.array] = []  # [B] each, by block position

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens; see `Rule`."""
        nothing = mx.zeros((logits.shape[0], 0), dtype=mx.int32)
        return self._rule.first(self._steering(logits[:, None], nothing)[:, 0])

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Choose the drafts of a block position, behind those before it; see `Rule`."""
        logits = logits if among is None else among.spread(logits)
        nothing = mx.zeros((logits.shape[0], 0), dtype=mx.int32)
        before = mx.stack(self._drafts, axis=1) if self._drafts else nothing
        steered = self._steering(logits[:, None], before, k, is_draft=True)
        chosen = self._rule.draft(steered[:, 0], k)
        self._drafts.append(chosen.astype(mx.int32))
        return chosen

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Decide what stays; see `Rule`."""
        return self._rule.verify(drafts, verify_len, self._steering(logits, drafts))


class Scored:
    """A rule that also scores what it chose, by the logits as they came from the target.

    Args:
        rule: decides.
        num_top: tokens that are scored beside the chosen ones.

    Attributes:
        scores: of the last choice, [B, W]: first tokens (W = 1), or those of a verified round:
            the accepted drafts, then the bonus; what follows means nothing. None: none was made.
    """

    def __init__(self, rule: Rule, num_top: int) -> None:
        self._rule = rule
        self._num_top = num_top
        self.scores: Scores | None = None

    def first(self, logits: mx.array) -> mx.array:
        """Choose the first answer tokens; see `Rule`."""
        first = self._rule.first(logits)
        self.scores = score(logits[:, None], first[:, None], self._num_top)
        return first

    def draft(self, logits: mx.array, k: int, among: Among | None = None) -> mx.array:
        """Choose the drafts of a block position; see `Rule`."""
        return self._rule.draft(logits, k, among)

    def verify(
        self, drafts: mx.array, verify_len: mx.array, logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Decide what stays; see `Rule`."""
        accepted, bonus = self._rule.verify(drafts, verify_len, logits)
        is_bonus = mx.arange(logits.shape[1]) == accepted[:, None]
        padded = mx.pad(drafts.astype(mx.int32), [(0, 0), (0, 1)])
        tokens = mx.where(is_bonus, bonus[:, None], padded)
        self.scores = score(logits, tokens, self._num_top)
        return accepted, bonus


def _residual(p: mx.array, q: mx.array, is_rejected: mx.array) -> mx.array:
    """Weigh the tokens [B, V] after the accepted drafts: p - q behind a rejected draft, else p."""
    residual = mx.maximum(p - q, 0)
    has_mass = residual.sum(axis=-1) > 1e-8  # DeepSpec's limit: below it, p and q are one
    return mx.where((is_rejected & has_mass)[:, None], residual, p)


def _at(probability: mx.array, tokens: mx.array) -> mx.array:
    """Look up the probability [B, K] of tokens [B, K] in [B, K, V]."""
    return mx.take_along_axis(probability, tokens[..., None], axis=-1)[..., 0]


def _row(probability: mx.array, index: mx.array) -> mx.array:
    """Take row index[b] of each slot of [B, W, V]; [B, V]."""
    return mx.take_along_axis(probability, index[:, None, None], axis=1)[:, 0]
