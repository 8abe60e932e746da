"""`python -m mdi` is the `mdi` command."""

from mdi.cli.app import main

main()
