"""Trains a drafter on what a target answered."""
