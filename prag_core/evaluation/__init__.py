"""Evaluation: the requests of each mode and control, the metrics, and the summary of a report."""
