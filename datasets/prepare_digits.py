#!/usr/bin/env python
"""Generates the embedded dataset, `digits_train` and `digits_val`, unless it is already there."""

import argparse
import logging
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a trace, in the imports too

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
from karat_det.data.digits import generate_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        default=os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")),
        help="folder that holds datasets (default: $DETECTRON2_DATASETS, or datasets without it: %(default)s)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(generate_digits(arguments.root))
    except OSError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
