"""neucore setup-host: install salesforce-lavis beside today's packages, which its own list of packages rules out."""

import argparse

HELP = "install the host, salesforce-lavis 1.0.2, beside today's packages (once an environment)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> None:
    """Fetch the released wheel, check it, write it again without its list of packages, install it. Raises HostError."""
    from neucore_plugin.host import wheel

    print(wheel.set_up())
