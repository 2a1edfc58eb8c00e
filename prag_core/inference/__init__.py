"""Inference: answer questions from a snapshot, for one caller (engine) or for many at once (service)."""
