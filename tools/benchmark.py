#!/usr/bin/env python
"""Measures what KArAt costs on this machine beside softmax, and prints a table of it.

Usage: python tools/benchmark.py --output output/benchmark
Let nothing else run meanwhile: other work disturbs the times.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
import torch
from detectron2.utils.logger import setup_logger

from karat_det.analysis.benchmark import PARTS, Turns, run_benchmark
from karat_det.analysis.benchmark_report import write_report
from karat_det.engine.setup import parse_command

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vitdet_karat.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="core: attention without the layers around it. step: training a detector, on random images. inference: "
        "images a second. scaling: time and memory of attention from 49 to 4096 tokens.",
    )
    parser.add_argument("--output", required=True, help="folder for table.md, results.json and scaling.png")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--config-file", default=str(CONFIG), help="the detector of step and inference (default: vitdet_karat.yaml)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="turns of each variant in a comparison (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=45.0,
        help="a comparison that takes longer has fewer turns, but three at least (default: %(default)g)",
    )
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--max-memory",
        type=float,
        default=8.0,
        help="GiB; scaling leaves out what would need more (default: %(default)g)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of config keys; behind -- and all else")
    args = parse_command(parser)
    for name in ("repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}. It must be at least 1.")
    for name in ("seconds", "max_memory"):
        value = getattr(args, name)
        if not value > 0:
            parser.error(f"--{name.replace('_', '-')} is {value}. It must be above 0.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no GPU here. Use --device cpu.")
    if args.threads:
        torch.set_num_threads(args.threads)
    setup_logger(name="karat_det")
    try:
        os.makedirs(args.output, exist_ok=True)
        turns = Turns(args.repeats, args.seconds, args.device)
        # Written after each part, so that what a later one meets loses nothing.
        for results in run_benchmark(args.parts, args.config_file, args.opts, turns, args.max_memory * 2**30):
            table = write_report(results, args.output)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{table}")
    print(f"Written to {args.output}: {', '.join(sorted(path.name for path in Path(args.output).iterdir()))}")


if __name__ == "__main__":
    main()
