"""`python -m mdi` is the `mdi` command."""

from mdi.cli import main

main()
