"""Many engines behind one job; only here, and in the stage for Ray Data, is Ray imported."""
