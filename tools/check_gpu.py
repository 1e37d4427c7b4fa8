#!/usr/bin/env python
"""Checks on a GPU what cannot be tested without one, in under ten minutes, and prints a table to paste into an issue.

Usage: python tools/check_gpu.py
Let nothing else use the GPU meanwhile: it disturbs the times.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import torch

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="The status is 1 where a row failed, 2 where there is no GPU. CUDA_VISIBLE_DEVICES chooses the GPUs.",
    )
    parser.add_argument(
        "--output",
        default="output/check_gpu",
        help="folder for table.md, logs, and traces of errors (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=570.0,
        help="checks that have not ended by then are left out, by name (default: %(default)g)",
    )
    args = parser.parse_args()
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds}. It must be above 0.")
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is not built for CUDA"
        print(
            "error: this check needs an NVIDIA GPU with its driver, and a PyTorch built for CUDA. Here PyTorch "
            f"{torch.__version__} {built}, and finds no GPU. Look at nvidia-smi and at CUDA_VISIBLE_DEVICES.",
            file=sys.stderr,
        )
        sys.exit(2)

    # Not above: it takes seconds, in vain without a GPU.
    import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

    # isort: split
    from karat_det.analysis.gpu_check import run_gpu_check

    try:
        report, passed = run_gpu_check(ROOT, Path(args.output), seconds=args.seconds)
    except OSError as error:
        parser.error(f"--output {args.output}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted. What was done by then is in {Path(args.output) / 'table.md'}.")
    print(f"\n{report}")
    print(f"Written to {Path(args.output) / 'table.md'}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
