"""The command line `prag`: one file a group of commands."""
