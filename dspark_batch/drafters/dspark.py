"""The DSpark drafter: a parallel block pass and a small sequential head, as in DeepSpec."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce

import mlx.core as mx
import mlx.nn as nn

from dspark_batch.caches.positions import PositionCache
from dspark_batch.caches.slot_cache import SlotCache
from dspark_batch.drafters.draft_layer import KeyValues
from dspark_batch.drafters.drafter import Choose, Draft
from dspark_batch.drafters.drafter_config import Attention, DrafterConfig
from dspark_batch.drafters.heads import MARKOV_HEADS, ConfidenceHead
from dspark_batch.models.target import TargetEnds
from dspark_batch.numerics.among import Among
from dspark_batch.numerics.masks import ragged_block, windowed_block


class DSparkDrafter(nn.Module):
    """A drafter as DeepSpec stores it; parameter names are the checkpoint's tensor names.

    Args:
        config: its settings.
        ends: the target's; needed if the config says that the drafter lacks its own.
    """

    def __init__(self, config: DrafterConfig, ends: TargetEnds | None = None) -> None:
        super().__init__()
        self.config = config
        self._ends = ends
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        drafted = config.draft_vocab_size or config.vocab_size
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        make_layer = config.family.draft_layer
        self.layers = [make_layer(config.layer) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(size, eps=eps)
        if config.own_head:
            self.lm_head = nn.Linear(size, drafted, bias=False)
        self.markov_head: nn.Module | None = None
        if config.markov_head_type is not None:
            head = MARKOV_HEADS[config.markov_head_type]
            self.markov_head = head(config.vocab_size, config.markov_rank, size, drafted)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            extra = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(size + extra)
        if config.draft_vocab_size is not None:
            self.d2t = mx.zeros(drafted, dtype=mx.int64)

    @property
    def block_size(self) -> int:
        """Tokens that one pass drafts."""
        return self.config.num_drafts

    @property
    def tap_ids(self) -> tuple[int, ...]:
        """Layers of the target whose outputs it reads."""
        return self.config.target_layer_ids

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return self.config.num_hidden_layers

    def make_cache(self, slots: int, positions: int) -> SlotCache:
        """Make its context: keys and values of committed positions."""
        return SlotCache((PositionCache,) * self.num_layers, slots, positions)

    @property
    def has_confidence(self) -> bool:
        """Whether drafts come with confidence logits."""
        return self.confidence_head is not None

    @property
    def among(self) -> Among | None:
        """The tokens that it drafts; None: all of the target's.

        Source:
            vLLM: `d2t` holds target id minus draft id.
        """
        drafted = self.config.draft_vocab_size
        if drafted is None:
            return None
        return Among(mx.arange(drafted) + self.d2t, self.config.vocab_size)

    def borrow(self, *, embedding: bool = False, head: bool = False) -> None:
        """Drop the own embedding or head, and use the target's from now on."""
        if embedding:
            del self.embed_tokens
        if head:
            del self.lm_head
        self.config = replace(
            self.config,
            own_embedding=self.config.own_embedding and not embedding,
            own_head=self.config.own_head and not head,
        )

    @property
    def _borrowed(self) -> TargetEnds:
        """The target's embedding and head, where the config says that the own ones are lacking."""
        if self._ends is None:
            raise ValueError("a drafter without its own embedding or head needs the target's")
        return self._ends

    def fuse(self, features: mx.array) -> mx.array:
        """Fuse tapped features [B, T, m*E] into context [B, T, E]; DSpark, eq. 2."""
        return self.hidden_norm(self.fc(features))

    def extend(self, context: SlotCache, features: mx.array | None) -> None:
        """Write keys and values of T further positions behind each slot's context.

        Args:
            context: written in place; its lengths stay, the caller says how many positions hold.
            features: [B, T, m*E], the target's tapped outputs at these positions.

        Raises:
            ValueError: there are no features.
        """
        if features is None:
            raise ValueError("the target gave no features, expected those of the tapped layers")
        fused, offset = self.fuse(features), context.lengths
        for layer, cache in zip(self.layers, _buffers(context), strict=True):
            layer.remember(fused, cache, offset)

    def propose(
        self, anchor: mx.array, context: SlotCache, num_drafts: int, choose: Choose
    ) -> Draft:
        """Draft from the anchor [B], at most `block_size` tokens, each taken by `choose`.

        The block has a place for each draft that is asked for; training has seen whole blocks only.
        The block's own keys and values lie behind the context and do not stay.
        """
        slots = num_drafts if self.config.anchor_predicts else 1 + num_drafts
        masks = mx.full((anchor.shape[0], slots - 1), self.config.mask_token_id)
        block = mx.concatenate([anchor[:, None], masks.astype(anchor.dtype)], axis=1)
        offset = context.lengths
        hidden = self._run(block, _buffers(context), offset, self._visible(context, slots))
        return self._draft(anchor, hidden, num_drafts, choose)

    def block_hidden(
        self, block: mx.array, caches: Sequence[KeyValues], offset: mx.array, mask: mx.array
    ) -> mx.array:
        """Run A blocks per row through all layers and the final norm.

        Args:
            block: [B, A*K] token ids, each block an anchor and its masks.
            caches: one per layer, holding the context's keys and values.
            offset: [B, A] int32, the anchors' positions.
            mask: bool, broadcasts to [B, heads, A*K, keys]; the same for all layers.

        Returns:
            [B, A*K, E].
        """
        return self._run(block, caches, offset.reshape(-1), [mask] * self.num_layers)

    def base_logits(self, hidden: mx.array) -> mx.array:
        """Map block output [..., E] to logits [..., V], before the Markov bias.

        A reduced vocabulary keeps its own size here.
        """
        if self.config.own_head:
            logits = self.lm_head(hidden)
        elif self.config.tied:
            logits = self.embed_tokens.as_linear(hidden)
        else:
            logits = self._borrowed.head(hidden)
        cap = self.config.settings.logit_softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def confidence(self, hidden: mx.array, embedding: mx.array | None) -> mx.array | None:
        """Map block output [..., E] and Markov embeddings [..., r] to confidence logits [...]."""
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov and embedding is not None:
            hidden = mx.concatenate([hidden, embedding], axis=-1)
        return self.confidence_head(hidden)

    def _run(
        self,
        block: mx.array,
        caches: Sequence[KeyValues],
        offset: mx.array,
        masks: Sequence[mx.array],
    ) -> mx.array:
        """Run blocks as `block_hidden` does, from offset [B*A], with a mask for each layer."""
        rows = (
            self.embed_tokens(block) if self.config.own_embedding else self._borrowed.embed(block)
        )
        scale = self.config.settings.embed_scale
        hidden = rows if scale == 1 else rows * scale
        for layer, cache, mask in zip(self.layers, caches, masks, strict=True):
            hidden = layer(hidden, cache, offset, mask)
        return self.norm(hidden)

    def _visible(self, context: SlotCache, slots: int) -> list[mx.array]:
        """Build the mask of each layer; layers that see alike share one."""
        attention = self.config.attention or (Attention(),) * self.num_layers
        where = (context.lengths, slots, context.capacity)
        masks = {
            kind: ragged_block(*where)
            if kind == Attention()
            else windowed_block(*where, **asdict(kind))
            for kind in set(attention)
        }
        return [masks[kind] for kind in attention]

    def _draft(self, anchor: mx.array, hidden: mx.array, num_drafts: int, choose: Choose) -> Draft:
        """Draft token by token from the block's output [B, slots, E]."""
        previous, state, head = anchor, None, self.markov_head
        if not self.config.anchor_predicts:
            if head is not None:  # training ran the head's state over the anchor's slot too
                _, state = head.bias(head.embed(anchor), hidden[:, 0], None)
            hidden = hidden[:, 1:]
        base, among = self.base_logits(hidden), self.among
        chosen, logits, embedding = [], [], None
        for k in range(num_drafts):
            corrected = base[:, k]
            if head is not None:
                bias, state = head.bias(head.embed(previous), hidden[:, k], state)
                corrected = corrected + bias
            logits.append(corrected)
            previous = choose(corrected, k, among)
            chosen.append(previous)
        tokens = mx.stack(chosen, axis=1).astype(anchor.dtype)
        if head is not None:  # looked up again at once: fewer launches than putting them together
            embedding = head.embed(mx.concatenate([anchor[:, None], tokens[:, :-1]], axis=1))
        highest = reduce(mx.maximum, [each.max(axis=-1) for each in logits])
        confidence = self.confidence(hidden, embedding)
        return Draft(tokens, mx.stack(logits, axis=1), confidence, highest)


def _buffers(context: SlotCache) -> list[PositionCache]:
    """List the layers of a context that `make_cache` made."""
    return [layer for layer in context.layers if isinstance(layer, PositionCache)]
