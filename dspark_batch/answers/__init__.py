"""What becomes of one answer: its tokens and text, where it ends, how its next token is chosen."""

import dspark_batch.blas  # noqa: F401  before MLX
