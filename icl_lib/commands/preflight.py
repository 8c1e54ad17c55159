"""`python -m icl_lib.commands.preflight params/gemma-2-9b.yaml --devices 8xv5e`: what a card needs, and whether it
fits.
"""

import argparse
import sys

from icl_lib.cards.card import CardError
from icl_lib.cards.checks import defaults_of, full_card
from icl_lib.planning.hardware import parse_devices
from icl_lib.planning.preflight import PreflightError, estimate, refuse, show


def main(argv: list[str] | None = None) -> int:
    """Print the estimate; exit status 1 if the card cannot fit, 2 if the card or the devices are not understood."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.preflight", description="What a card needs, and whether it fits."
    )
    parser.add_argument("card", help="a card, such as params/gemma-2-9b.yaml")
    parser.add_argument("--devices", default="cpu", help="h100, 8xv5e, v4-8, cpu, ...")
    options = parser.parse_args(argv)
    try:
        card, devices = defaults_of(full_card(options.card)), parse_devices(options.devices)
    except (CardError, ValueError) as err:
        print(err, file=sys.stderr)
        return 2
    try:
        found = estimate(card, devices)
        print(show(found), flush=True)
        refuse(found)
    except PreflightError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
