#!/usr/bin/env python
"""Draws what a trained detector finds on images or on a dataset, and writes its predictions as COCO results JSON."""

import argparse
import os
import sys

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from karat_det.analysis.visualization import (
    FailedImagesError,
    dataset_classes,
    image_records,
    picture_paths,
    predict,
)
from karat_det.checkpoint.loading import check_weights_file, load_weights
from karat_det.data.dataset_check import check_datasets, load_checked_test_dicts, num_classes
from karat_det.data.mapper import build_mapper
from karat_det.engine.setup import load_cfg, parse_command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The JSON, coco_instances_results.json, holds every prediction that the model returns, whatever "
        "--threshold and --top-k say: those two are for the pictures. Its image ids are the dataset's; with --input, "
        "images.json says which image has which id. Files of an earlier run in the output folder are replaced. An "
        "image that fails is named, and left out; then the exit status is 1.",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config that it was trained with")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, or folders of images (without subfolders)")
    source.add_argument("--dataset", metavar="NAME", help="a dataset, as in DATASETS.TEST; its truth is drawn too")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and the JSON")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw at most K predictions an image, the best")
    parser.add_argument("--max-images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of config keys; behind all else")
    args = parse_command(parser)
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is {args.threshold}. It must be from 0 to 1.")
    for name in ("top_k", "max_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}. It must be at least 1.")
    return args


def main(args: argparse.Namespace) -> None:
    try:
        test_set = ["DATASETS.TEST", str((args.dataset,))] if args.dataset else []
        cfg = load_cfg(args.config_file, args.opts + test_set, own_data_needed=args.dataset is not None)
        check_weights_file(args.weights, "--weights")
        if args.dataset:
            check_datasets(cfg, training=False)
        records = load_checked_test_dicts(cfg, all_images=False) if args.dataset else image_records(args.input)
        records = records[: args.max_images]
        classes = dataset_classes(cfg.DATASETS.TEST, num_classes(cfg))
        os.makedirs(args.output, exist_ok=True)
        picture_paths(records, args.output)
        mapper = build_mapper(cfg, is_train=False)
        model = build_model(cfg)
        load_weights(model, args.weights, strict=cfg.MODEL.WEIGHTS_STRICT)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    try:
        predict(
            model,
            mapper,
            classes,
            records,
            args.output,
            ground_truth=args.dataset is not None,
            threshold=args.threshold,
            top_k=args.top_k,
        )
    except (OSError, FailedImagesError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(records)} pictures and coco_instances_results.json are in {args.output}")


if __name__ == "__main__":
    args = parse_args()
    for name in ("karat_det", "detectron2", "fvcore"):
        setup_logger(name=name)
    main(args)
