"""What a model remembers of its slots: one file for each kind of layer."""
