"""Align ear and eye: the aligners of one model, where they stand, and what a training step owes them."""
