"""`python -m mdi` is the `mdi` command."""

import sys

from mdi.cli.parent import OPTION, end_with_parent

if OPTION in sys.argv:
    end_with_parent()

from mdi.cli.app import main  # takes a while: the parent may end meanwhile

main()
