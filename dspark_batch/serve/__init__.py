"""An OpenAI-compatible server: live requests and durable batches on one engine."""
