"""What becomes of an answer: its tokens, text and end; who drafts and what chooses for it."""

import dspark_batch.blas  # noqa: F401  before MLX
