#!/usr/bin/env python
"""Trains or evaluates a classifier, whose weights then start a detector.

Usage: python tools/pretrain_net.py --config-file configs/pretrain/vit_tiny_imagenet.yaml --data DIR [KEY VALUE ...]
"""

import argparse
import sys

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from karat_det.checkpoint.loading import check_weights_file
from karat_det.engine.full_disk import start_log
from karat_det.engine.output_dir import begin, claims
from karat_det.engine.pretraining import Pretrainer, evaluate_file, load_pretrain_cfg
from karat_det.engine.processes import goes_on, run_distributed, take_folder
from karat_det.engine.setup import log_device, parse_command


@claims()
def main(args):
    try:
        on_cpu = ["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []
        cfg = load_pretrain_cfg(args.config_file, args.opts + on_cpu, args.data)
        if args.init_from:
            check_weights_file(args.init_from, "--init-from")
        if not args.eval_only:
            args.resume = goes_on(cfg.OUTPUT_DIR, args.resume)
        if not args.eval_only:
            take_folder(cfg.OUTPUT_DIR)
        comm.synchronize()
        start_log(cfg, args)
        log_device(cfg, args.num_gpus)
        if args.eval_only:
            evaluate_file(cfg, args.init_from)
            return
        trainer = Pretrainer(cfg, args.init_from, args.resume)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    begin(cfg.OUTPUT_DIR)
    trainer.train()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser(epilog="KEY VALUE: see pretrain_config in karat_det/config.py.")
    parser.add_argument("--data", default="", metavar="DIR", help="the folder that holds the data (DATA.ROOT)")
    parser.add_argument(
        "--init-from",
        default="",
        metavar="FILE",
        help="weights to start from, of any number of classes; with --eval-only, those to evaluate (default there: "
        "model_best.pth in OUTPUT_DIR)",
    )
    return parse_command(parser, arguments)


if __name__ == "__main__":
    args = parse_arguments()
    run_distributed(main, args)
