"""Shared by all stages on Ray: tables, actors with child processes, progress, and recovery after a loss."""
