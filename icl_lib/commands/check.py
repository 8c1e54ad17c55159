"""`python -m icl_lib.commands.check params/tiny.yaml`: hold cards to what they can say, and print what every key means."""

import json
import sys

from icl_lib.cards.card import CardError, all_declared
from icl_lib.cards.checks import full_card


def main(argv: list[str]) -> int:
    """Check cards and print their values beside their meanings; exit status 2 on the first bad card."""
    for path in argv or ["params/tiny.yaml"]:
        try:
            card, known = full_card(path), all_declared()
        except CardError as err:
            print(err, file=sys.stderr)
            return 2
        print(f"{path}: {len(card)} of {len(known)} keys set, all valid")
        for name, p in known.items():
            value = json.dumps(card[name]) if name in card else f"{json.dumps(p.default)} (default)"
            print(f"  {name:<20} {value:<32} {p.help}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
