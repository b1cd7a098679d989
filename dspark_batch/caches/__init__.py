"""What a model remembers: of slots, by kind of layer, and of beginnings that prompts share."""

import dspark_batch.blas  # noqa: F401  before MLX
