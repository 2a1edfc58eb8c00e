"""Thin Ray files, one a stage, and the command line: read, one call into prag_core, commit."""
