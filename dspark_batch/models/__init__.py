import dspark_batch.blas  # noqa: F401  before MLX
from dspark_batch.models.kept_names import keep_names

keep_names()  # before transformers
