"""Augmentation: a passage becomes rewrites and question-answer pairs, or a reject."""
