"""The drafter's block pass in plain NumPy, float64, one sequence: slow and obvious.

Written from the method's description and from the raw config.json, not from the package; checked
against the recorded cases, then used where nothing was recorded.
"""

import math

import numpy as np


def rms(x, gain=1.0, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x, position, theta, share=1.0):
    """Turn [T, N, D]; pair i is (i, i + D/2), and only the first `share` of the pairs turns."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    frequency[int(share * half) :] = 0
    angle = position[:, None, None] * frequency
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


class Reference:
    """One drafter.

    Args:
        config: the raw config of the draft layers, family gemma4 if it has a global_head_dim.
        weights: the checkpoint's tensors.
        sees: (layer, slot, slots, context) -> bool [context + slots], default everything.
    """

    def __init__(self, config, weights, sees=None):
        self.config, self.sees = config, sees
        self.weights = {name: np.array(array, dtype=np.float64) for name, array in weights.items()}
        self.gemma = "global_head_dim" in config
        self.eps = config["rms_norm_eps"]

    def linear(self, name, x):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights.get(f"{name}.bias", 0)

    def norm(self, name, x):
        return rms(x, self.weights[f"{name}.weight"], self.eps)

    def fuse(self, features):
        return self.norm("hidden_norm", self.linear("fc", np.array(features, dtype=np.float64)))

    def hidden(self, rows, features):
        """The block's output [slots, E] for embedded rows [slots, E], context first."""
        context, slots = self.fuse(features), len(rows)
        position = np.arange(len(context) + slots)
        x = rows
        for layer in range(self.config["num_hidden_layers"]):
            x = self.layer(layer, x, context, position)
        return self.norm("norm", x)

    def layer(self, layer, x, context, position):
        at = f"layers.{layer}"
        attended = self.attend(layer, self.norm(f"{at}.input_layernorm", x), context, position)
        if not self.gemma:
            x = x + attended
            inner = self.norm(f"{at}.post_attention_layernorm", x)
            return x + self.mlp(at, inner, silu)
        x = x + self.norm(f"{at}.post_attention_layernorm", attended)
        inner = self.mlp(at, self.norm(f"{at}.pre_feedforward_layernorm", x), gelu_tanh)
        x = x + self.norm(f"{at}.post_feedforward_layernorm", inner)
        return x * self.weights[f"{at}.layer_scalar"]

    def mlp(self, at, x, activate):
        gate = activate(self.linear(f"{at}.mlp.gate_proj", x))
        return self.linear(f"{at}.mlp.down_proj", gate * self.linear(f"{at}.mlp.up_proj", x))

    def attend(self, layer, x, context, position):
        at = f"layers.{layer}.self_attn"
        dim = self.config["global_head_dim" if self.gemma else "head_dim"]
        rope = self.config.get("rope_parameters") or self.config
        rope = rope.get("full_attention", rope)
        turn = (rope["rope_theta"], rope.get("partial_rotary_factor", 1.0) if self.gemma else 1.0)
        both, slots = np.concatenate([context, x]), len(x)

        def heads(name, rows):
            return self.linear(f"{at}.{name}", rows).reshape(len(rows), -1, dim)

        queries = rotate(self.norm(f"{at}.q_norm", heads("q_proj", x)), position[-slots:], *turn)
        raw = heads("k_proj", both)
        keys = rotate(self.norm(f"{at}.k_norm", raw), position, *turn)
        values = heads("v_proj", both) if f"{at}.v_proj.weight" in self.weights else raw
        if self.gemma:
            values = rms(values, eps=self.eps)
        group = queries.shape[1] // keys.shape[1]
        scale = 1.0 if self.gemma else dim**-0.5
        out = np.zeros_like(queries)
        for slot in range(slots):
            seen = np.ones(len(both), bool)
            if self.sees is not None:
                seen = self.sees(layer, slot, slots, len(context))
            for head in range(queries.shape[1]):
                score = keys[:, head // group] @ queries[slot, head] * scale
                weight = np.where(seen, np.exp(score - score[seen].max()), 0)
                out[slot, head] = weight @ values[:, head // group] / weight.sum()
        return self.linear(f"{at}.o_proj", out.reshape(slots, -1))

    def draft(self, anchor, hidden, base, *, first=0):
        """Draft greedily from base logits [slots, V]; slots before `first` only move the state.

        Returns:
            Tokens, corrected logits and confidence logits (None without a head) from `first` on.
        """
        rank = self.config.get("markov_rank", 0)
        previous, state, tokens, logits, confidence = anchor, np.zeros(rank), [], [], []
        for slot in range(len(hidden)):
            bias, embedding = 0.0, None
            if rank:
                embedding = self.weights["markov_head.markov_w1.weight"][previous]
                bias, state = self.bias(embedding, hidden[slot], state)
            if slot < first:
                continue
            logits.append(base[slot] + bias)
            if self.config["enable_confidence_head"]:
                with_markov = self.config.get("confidence_head_with_markov")
                parts = [hidden[slot], embedding] if with_markov else [hidden[slot]]
                confidence.append(self.linear("confidence_head.proj", np.concatenate(parts))[0])
            tokens.append(int(np.argmax(logits[-1])))
            previous = self.token(tokens[-1])
        return tokens, np.array(logits), np.array(confidence) if confidence else None

    def token(self, drafted):
        """The target's id of a drafted one."""
        table = self.weights.get("d2t")
        return drafted if table is None else int(drafted + table[drafted])

    def bias(self, embedding, hidden, state):
        kind = self.config["markov_head_type"]
        if kind == "gated":
            joint = np.concatenate([hidden, embedding])
            embedding = sigmoid(self.linear("markov_head.gate_proj", joint)) * embedding
        if kind == "rnn":
            joint = np.concatenate([state, embedding, hidden])
            gate, new, out = np.split(self.linear("markov_head.joint_proj", joint), 3)
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(new)
            embedding = np.tanh(out)
        return self.weights["markov_head.markov_w2.weight"] @ embedding, state
