"""The only room that knows transformers: every name of theirs that we rely on, found per model and per call, and surveyed."""
