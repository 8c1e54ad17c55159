"""`python -m icl_lib.commands.retrain`: make the embedded model, its tokenizer and its SAE suite again from nothing."""

import argparse
from pathlib import Path

from icl_lib.embedded.icl_tiny.pretrain import PretrainConfig
from icl_lib.embedded.icl_tiny.retrain import SuiteConfig, retrain
from icl_lib.files.paths import root


def main():
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.retrain",
        description="Make the embedded model, its tokenizer and its SAE suite again from nothing.",
    )
    parser.add_argument(
        "--folder", type=Path, default=root() / "assets" / "icl-tiny", help="where they go (default: %(default)s)"
    )
    folder = parser.parse_args().folder
    made = retrain(folder, PretrainConfig(), SuiteConfig())
    print(f"wrote {folder} in {made['minutes']} minutes")


if __name__ == "__main__":
    main()
