"""Training: an augmentation becomes examples, and many adapters train at once on one frozen model."""
