"""Whole jobs: a run, the nightly re-index, the demo, a warm-up, and submitting them to a cluster."""
