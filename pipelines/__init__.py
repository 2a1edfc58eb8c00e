"""Stages and jobs on Ray, and the command line. Each stage reads from the store, calls prag_core, and commits."""
