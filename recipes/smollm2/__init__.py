"""A real pair from a package of the registry: SmolLM2-135M-Instruct and a drafter for it."""
