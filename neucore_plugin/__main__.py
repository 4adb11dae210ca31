"""`python -m neucore_plugin`: the same as the command `neucore`."""

import sys

from neucore_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
