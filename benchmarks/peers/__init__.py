"""Other engines on the same job, each at its best and in an environment of its own; see README."""
