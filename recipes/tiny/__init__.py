"""Training: a tiny target with its tokenizer, and DSpark drafters for any Qwen3-shaped target."""

import dspark_batch.blas  # noqa: F401  before MLX
