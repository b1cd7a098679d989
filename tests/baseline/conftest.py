from small_blocks import small_blocks  # noqa: F401
