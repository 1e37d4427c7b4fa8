#!/usr/bin/env python
"""Brings weights of timm, DeiT, MAE, Swin or ViTDet to the names of our detectors; with --publish, adds a model card.

MODEL.WEIGHTS takes the same files as they are.
"""

import argparse
import logging
import sys

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
from detectron2.utils.logger import setup_logger

from karat_det.checkpoint.publishing import convert_file, find_run, write_card
from karat_det.engine.setup import parse_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="IN", help="weights: .pth, .pt, .bin, .safetensors or .pkl")
    parser.add_argument("target", metavar="OUT", help="file to write: .pth, .pt, .bin or .safetensors")
    parser.add_argument("--publish", metavar="OUTPUT_DIR", help="the run that IN is from, for a model card beside OUT")
    parser.add_argument("--commit", default="", help="commit that trained them (default: that of this working copy)")
    parser.add_argument("--notes", default="", help="text for the card")
    args = parse_command(parser)
    if args.publish and not args.target.endswith(".safetensors"):
        parser.error(f"OUT is {args.target}. Weights are published as .safetensors.")
    if not args.publish and (args.commit or args.notes):
        parser.error("--commit and --notes are for the card of --publish.")
    setup_logger(name="karat_det")
    try:
        if args.publish:
            find_run(args.publish)
        checkpoint = convert_file(args.source, args.target)
        if args.publish:
            card = write_card(args.target, args.publish, checkpoint, commit=args.commit, notes=args.notes)
            logging.getLogger("karat_det").info("Model card: %s", card)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
