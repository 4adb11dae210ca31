"""`python -m lavis.train --cfg-path X.yaml`: a module that the host's wheel lacks; delegates to the plug-in."""

import sys

from neucore_plugin.cli import run_train

if __name__ == "__main__":
    sys.exit(run_train())
