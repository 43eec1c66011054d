"""Run the command line with `python -m teal`."""

from teal.cli.main import main

main()
