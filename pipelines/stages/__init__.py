"""The stages of a run, one file each: ingest, augment, train, index."""
