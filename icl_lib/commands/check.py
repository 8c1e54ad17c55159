"""`python -m icl_lib.commands.check params/tiny.yaml`: hold cards to their model, and print what every key means."""

import argparse
import json
import sys

from icl_lib.cards.card import Card, CardError, check_card
from icl_lib.cards.checks import check_against_model


def main(argv: list[str] | None = None) -> int:
    """Check cards and print their values beside their meanings; exit status 2 on the first bad card."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.check",
        description="Hold cards to their models, and print what every key means.",
    )
    parser.add_argument("cards", nargs="*", default=["params/tiny.yaml"], help="files of cards (default: the embedded)")
    for path in parser.parse_args(argv).cards:
        try:
            card = check_card(path)
            check_against_model(card.model_dump(), path)
        except CardError as err:
            print(err, file=sys.stderr)
            return 2
        print(f"{path}: {len(card.model_fields_set)} of {len(Card.model_fields)} keys set, all valid")
        for name, field in Card.model_fields.items():
            value = json.dumps(getattr(card, name)) + ("" if name in card.model_fields_set else " (default)")
            print(f"  {name:<20} {value:<32} {field.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
