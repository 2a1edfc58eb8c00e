"""An evaluation on Ray or against a running server, from questions to a report."""
