"""Pretrains a classifier, and shows what a detector gains by it: `make demo-pretrained` after the installation.

Pretrains configs/pretrain/digits.yaml on crops of the embedded digits, then trains configs/quickstart.yaml twice for
the same number of steps, from random weights and from the pretrained ones, both with the layer-wise decay of the rate
that is usual for pretrained ones, and prints box and mask AP of both. The classifier is trained on none of the digits
that the detectors are evaluated on. Finished steps are not repeated.

Usage: python tools/demo_pretrained.py
"""

from pathlib import Path

from demo import CONFIG, DATASET, average_precision, run, run_step, run_training, say, train

PRETRAINING = "configs/pretrain/digits.yaml"
OUTPUT = Path("output/demo_pretrained")
CLASSIFIER = OUTPUT / "classifier"
WEIGHTS = CLASSIFIER / "model_last.pth"  # the best one was chosen by looking at digits of digits_val
STEPS = 400


def main() -> None:
    run_step("Making the embedded dataset", "datasets/prepare_digits.py")
    run_training(f"Pretraining {PRETRAINING}", "tools/pretrain_net.py", PRETRAINING, CLASSIFIER)
    shorter = ("SOLVER.MAX_ITER", str(STEPS), "SOLVER.WARMUP_ITERS", "50", "SOLVER.CHECKPOINT_PERIOD", "100")
    fine_tuning = ("SOLVER.LAYER_DECAY", "0.85")
    rows = {
        "random weights": (OUTPUT / "random", ()),
        "pretrained": (OUTPUT / "pretrained", ("MODEL.WEIGHTS", WEIGHTS)),
    }
    for folder, weights in rows.values():
        train(CONFIG, folder, *shorter, *fine_tuning, *map(str, weights))

    say(f"Done. COCO AP (the mean over IoU 0.50 to 0.95, in percent) on {DATASET} after {STEPS} steps:")
    print("      start            box AP  mask AP")
    for start, (folder, _) in rows.items():
        box_ap, mask_ap = average_precision(folder)
        print(f"      {start:<15}  {box_ap:6.1f}  {mask_ap:7.1f}")


if __name__ == "__main__":
    run(main)
