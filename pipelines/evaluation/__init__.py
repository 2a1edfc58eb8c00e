"""The evaluation on Ray, from questions to a report."""
