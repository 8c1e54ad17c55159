"""`python -m icl_lib.commands.rehearse gemma-2-9b` (or `--all`): a card from end to end on small stand-ins, offline."""

import argparse
import sys

from icl_lib.cards.card import CardError
from icl_lib.planning.preflight import PreflightError
from icl_lib.planning.rehearse import cards, rehearse, which


def main(argv: list[str] | None = None) -> int:
    """Rehearse cards; exit status 1 if a notebook failed, 2 if a card is not understood."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.rehearse", description="Run a card on small stand-ins, offline."
    )
    parser.add_argument("cards", nargs="*", help="names or files of cards, such as gemma-2-9b")
    parser.add_argument("--all", action="store_true", help="every card in params/ but that of the embedded model")
    options = parser.parse_args(argv)
    if not options.all and not options.cards:
        print(which(), file=sys.stderr)
        return 2
    try:
        results = [rehearse(name) for name in (map(str, cards()) if options.all else options.cards)]
    except (CardError, PreflightError) as err:
        print(err, file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
