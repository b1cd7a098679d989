import dspark_batch.blas  # noqa: F401  before MLX
