#!/usr/bin/env python
"""Trains or evaluates a detector: the command line of Detectron2's tools/train_net.py."""

import sys

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import karat_det.quiet  # noqa: F401  before Detectron2, whose imports warn of their own old calls

# isort: split
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from karat_det.checkpoint.loading import SafeCheckpointer, check_weights_file
from karat_det.data.dataset_check import load_checked_test_dicts
from karat_det.engine.full_disk import full_disk_named, start_log
from karat_det.engine.output_dir import begin, claims
from karat_det.engine.processes import goes_on, run_distributed, take_folder
from karat_det.engine.setup import check_model_and_datasets, load_cfg, log_device, parse_command
from karat_det.engine.trainer import Trainer


def read_config(args):
    on_cpu = ["MODEL.DEVICE", "cpu"] if args.num_gpus == 0 else []
    return load_cfg(args.config_file, args.opts + on_cpu)


def check(args, num_processes):
    cfg = read_config(args)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; --eval-only needs at least one dataset to evaluate on.")
    check_model_and_datasets(cfg, training=not args.eval_only, num_processes=num_processes)


@claims()
def main(args):
    try:
        cfg = read_config(args)
        if not args.eval_only:
            args.resume = goes_on(cfg.OUTPUT_DIR, args.resume)
        resumes = args.resume and SafeCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint()
        if not resumes and (args.eval_only or cfg.MODEL.WEIGHTS):
            check_weights_file(cfg.MODEL.WEIGHTS)
        if not args.eval_only:
            take_folder(cfg.OUTPUT_DIR)
        comm.synchronize()
        start_log(cfg, args)
        log_device(cfg, args.num_gpus)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            load_checked_test_dicts(cfg)
            checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, strict=cfg.MODEL.WEIGHTS_STRICT, complete=True)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")

    if args.eval_only:
        with full_disk_named(cfg.OUTPUT_DIR):
            results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        begin(cfg.OUTPUT_DIR)
        trainer.train()


if __name__ == "__main__":
    args = parse_command(default_argument_parser())
    run_distributed(main, args, check)
