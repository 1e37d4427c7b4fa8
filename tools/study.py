#!/usr/bin/env python
"""Trains the variants of a study over seeds and starts, and makes a table and a plot of their AP.

Usage: python tools/study.py --study studies/digits.yaml --output output/studies/digits
Table and plot are written anew after each run. A run that is finished is not repeated, an interrupted one goes on: give
the same command again.
"""

import argparse
import logging
import os
import sys

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
import torch
from detectron2.utils.logger import setup_logger

from karat_det.analysis import study
from karat_det.engine.setup import parse_command


def main() -> None:
    parser = argparse.ArgumentParser(description=study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="YAML file of the study")
    parser.add_argument("--output", required=True, help="folder for the runs, the table and the plot")
    parser.add_argument(
        "--jobs",
        type=int,
        default=torch.cuda.device_count() or os.cpu_count(),
        help="runs at a time (default: %(default)s)",
    )
    args = parse_command(parser)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}. It must be at least 1.")
    setup_logger(name="karat_det")
    logging.getLogger("karat_det.checkpoint").setLevel(logging.WARNING)
    try:
        runs = study.Study.load(args.study)
        os.makedirs(args.output, exist_ok=True)
        print(study.run_study(runs, args.output, args.jobs))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"Written to {args.output}: table.md, plot.png, results.json")


if __name__ == "__main__":
    main()
