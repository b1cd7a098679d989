"""Training: a tiny target with its tokenizer, and DSpark drafters for any Qwen3-shaped target."""
