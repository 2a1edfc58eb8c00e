"""Measuring answers: what is asked under which control, the metrics, and the summary of a report."""
