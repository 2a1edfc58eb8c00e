"""The command line `prag`: one file for each group of commands."""
