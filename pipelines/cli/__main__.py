"""Run the command line: `python -m pipelines.cli`."""

from pipelines.cli.app import main

main()
