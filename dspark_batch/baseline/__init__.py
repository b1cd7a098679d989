"""What answers are held against: mlx-lm's own generation, and how clear a choice was."""

import dspark_batch.blas  # noqa: F401  before MLX
