"""Compares variants of a detector over seeds and starts: trains each, then makes a table and a plot of their AP.

A study is a YAML file:

    CONFIG: path of the config that all runs share, from the folder of the file
    SETTINGS: {KEY: value} of all runs
    SEEDS: [1, 2, 3]
    STARTS:
      random: {}                # random weights
      softmax: {KEY: value, …}  # settings of a run to train first; the others start from its backbone
    VARIANTS:
      name: {KEY: value, …}     # the others are compared with the first
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tabulate import tabulate

from ..checkpoint.run_folder import read_metrics, write_whole
from ..engine.setup import check_model_and_datasets, load_cfg
from ..engine.signals import LAUNCHED
from ..yaml_file import read_yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger(__name__)

_TRAIN_NET = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"
_DIVERGED = "error: Training diverged"
_METRICS = {"segm/AP": "mask AP", "bbox/AP": "box AP"}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study's file, see the module's docstring. `config` is a path; settings map keys to values."""

    config: Path
    settings: Settings
    seeds: list[int]
    starts: dict[str, Settings]
    variants: dict[str, Settings]

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Reads a study and checks the settings of each of its runs.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no study, or a run's config has an unknown key, a value that is not allowed, or sizes that
                do not fit each other.
        """
        path = Path(path)
        content = read_yaml(path, "study")
        expected = {"CONFIG": str, "SETTINGS": dict, "SEEDS": list, "STARTS": dict, "VARIANTS": dict}
        if set(content) != set(expected):
            raise ValueError(f"{path} is no study: it must have the keys {', '.join(expected)}, and no others.")
        for key, kind in expected.items():
            if not isinstance(content[key], kind) or (key != "SETTINGS" and not content[key]):
                raise ValueError(f"{path}: {key} is {content[key]!r}. It must be a {kind.__name__} and not empty.")
        if not all(type(seed) is int and 0 <= seed < 2**31 for seed in content["SEEDS"]):
            raise ValueError(f"{path}: SEEDS is {content['SEEDS']}. They must be whole numbers from 0 to 2147483647.")
        for key in ("STARTS", "VARIANTS"):
            for name, settings in content[key].items():
                if not any(letter.isalnum() for letter in name):
                    raise ValueError(f"{path}: one of {key} is {name!r}. A name must have a letter or a digit.")
                if not isinstance(settings, dict):
                    raise ValueError(f"{path}: {key} {name!r} is {settings!r}. It must map config keys to values.")
        study = cls(
            config=path.parent / content["CONFIG"],
            settings=content["SETTINGS"],
            seeds=content["SEEDS"],
            starts=content["STARTS"],
            variants=content["VARIANTS"],
        )
        for key, names in (("STARTS", study.starts), ("VARIANTS", study.variants)):
            if len({_folder_name(name) for name in names}) < len(names):
                raise ValueError(f"{path}: two of {key} differ only in signs, and would share a folder. Rename one.")
        if len(set(study.seeds)) < len(study.seeds):
            raise ValueError(f"{path}: SEEDS is {study.seeds}. Each may be there once.")
        for key, runs in (("STARTS", study.starts), ("VARIANTS", study.variants)):
            for name, settings in runs.items():
                try:
                    study.check(settings)
                except ValueError as error:
                    raise ValueError(f"{path}: {key} {name!r}, with SETTINGS: {error}") from error
        return study

    def check(self, settings: Settings) -> None:
        """Raises ValueError or FileNotFoundError if a run with these settings, and those of all, cannot be one."""
        cfg = load_cfg(str(self.config), _words(self.settings | settings))
        check_model_and_datasets(cfg, training=True)
        if not cfg.MODEL.MASK_ON or not cfg.DATASETS.TEST:
            raise ValueError(
                f"MODEL.MASK_ON is {cfg.MODEL.MASK_ON} and DATASETS.TEST {cfg.DATASETS.TEST}. A study compares mask "
                "AP: it needs masks, and a dataset to evaluate on."
            )

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """(variant, start, seed) of every run, seed by seed, so that an interrupted study has compared all variants."""
        for seed in self.seeds:
            for start in self.starts:
                for variant in self.variants:
                    yield variant, start, seed


def run_study(study: Study, output_dir: str | Path, jobs: int) -> str:
    """Trains and evaluates every run that has no result yet, several at a time, and writes the report after each.

    Each run has its own folder, with its console in console.txt. An interrupted run goes on from its last checkpoint. A
    run that diverged is a result.

    Args:
        study: what to train.
        output_dir: folder of the study.
        jobs: how many runs train at a time; each has a GPU, or else a core.

    Returns:
        The table of `write_report`.

    Raises:
        RuntimeError: a run failed otherwise.
    """
    output_dir = Path(output_dir)

    def train_start(start: str) -> Path:
        folder = output_dir / _folder_name(start)
        result = _train(study, study.settings | study.starts[start], folder, job=0)
        if not np.isfinite(result["segm/AP"]):
            raise RuntimeError(f"{folder}: the start {start!r} diverged, so that nothing can start from it.")
        return _backbone_alone(folder)

    def train(job: int, variant: str, start: str, seed: int) -> dict[str, Any]:
        settings = study.settings | study.variants[variant] | {"SEED": seed}
        folder = output_dir / _folder_name(start) / _folder_name(variant) / f"seed_{seed}"
        of_start = (study.settings | study.starts[start], weights[start].result()) if start in weights else ()
        result = _train(study, settings, folder, job, *of_start)
        logger.info("%s, from %s, seed %d: mask AP %.1f", variant, start, seed, result["segm/AP"])
        return {"variant": variant, "start": start, "seed": seed, **result}

    with ThreadPoolExecutor(jobs) as pool:
        # Submitted first, so that the runs that wait for them never block them.
        weights = {start: pool.submit(train_start, start) for start, settings in study.starts.items() if settings}
        futures = [pool.submit(train, index % jobs, *run) for index, run in enumerate(study.runs())]
        try:
            for _ in as_completed(futures):
                table = write_report(study, [future.result() for future in futures if future.done()], output_dir)
            return table
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_report(study: Study, results: list[dict[str, Any]], output_dir: str | Path) -> str:
    """Writes results.json, table.md and plot.png.

    Args:
        study: what was trained.
        results: for each run that has ended a dict with variant, start, seed, and "segm/AP" and "bbox/AP" in percent,
            NaN if it diverged.
        output_dir: folder of the study.

    Returns:
        The table, in Markdown: for each variant and start the mean of the seeds, their standard deviation, and the mean
        difference of mask AP to the first variant at the same seeds; and how many seeds that are, if not yet all.
    """
    output_dir = Path(output_dir)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    values = {
        (start, variant, metric): np.array(
            [r[metric] for r in results if (r["start"], r["variant"]) == (start, variant)]
        )
        for start in study.starts
        for variant in study.variants
        for metric in _METRICS
    }
    mask_ap = {(r["start"], r["variant"], r["seed"]): r["segm/AP"] for r in results}
    baseline = next(iter(study.variants))
    header = ["variant"]
    for start in study.starts:
        header += [f"from {start}: mask AP", f"against {baseline}", "box AP"]
    rows = []
    for variant in study.variants:
        row = [variant]
        for start in study.starts:
            differences = np.array(
                [
                    mask_ap[start, variant, seed] - mask_ap[start, baseline, seed]
                    for seed in study.seeds
                    if {(start, variant, seed), (start, baseline, seed)} <= mask_ap.keys()
                ]
            )
            differences = differences[np.isfinite(differences)]
            row.append(_mean_and_deviation(values[start, variant, "segm/AP"], len(study.seeds)))
            row.append("" if variant == baseline or not len(differences) else f"{differences.mean():+.1f}")
            row.append(_mean_and_deviation(values[start, variant, "bbox/AP"], len(study.seeds)))
        rows.append(row)
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    (output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(study, values, output_dir / "plot.png")
    return table


def _mean_and_deviation(values: np.ndarray, num_seeds: int) -> str:
    if not len(values):
        return "not yet run"
    finite = values[np.isfinite(values)]
    diverged = len(values) - len(finite)
    notes = []
    if len(values) < num_seeds:
        notes.append(f"{len(values)} of {num_seeds} seeds")
    if diverged and len(finite):
        notes.append(f"{diverged} of {len(values)} diverged")
    text = "diverged"
    if len(finite):
        text = f"{finite.mean():.1f}" + (f" ± {finite.std(ddof=1):.1f}" if len(finite) > 1 else "")
    return text + (f" ({', '.join(notes)})" if notes else "")


def _plot(study: Study, values: dict, path: Path) -> None:
    """A dot for each seed and a bar for their mean; a panel for each start, with the first variant's mean as a line."""
    names = list(study.variants)
    figure, panels = plt.subplots(
        1, len(study.starts), figsize=(1.5 + 4 * len(study.starts), 1 + 0.4 * len(names)), sharey=True, squeeze=False
    )
    for panel, start in zip(panels[0], study.starts, strict=True):
        for row, variant in enumerate(names):
            mask_ap = values[start, variant, "segm/AP"]
            finite = mask_ap[np.isfinite(mask_ap)]
            panel.plot(finite, [row] * len(finite), "o", color="C0", alpha=0.6)
            if len(finite):
                panel.plot([finite.mean()] * 2, [row - 0.3, row + 0.3], "k-")
            if len(finite) < len(mask_ap):
                text = f"{len(mask_ap) - len(finite)} of {len(mask_ap)} diverged"
                panel.text(0.98, row, text, transform=panel.get_yaxis_transform(), ha="right", va="center")
            if row == 0 and len(finite):
                panel.axvline(finite.mean(), color="0.7", linewidth=0.8, zorder=0)
        panel.set_title(f"from {start}")
        panel.set_xlabel("mask AP")
        panel.set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _train(
    study: Study, settings: Settings, folder: Path, job: int, start: Settings | None = None, weights: Path | None = None
) -> dict[str, float]:
    """Trains a run to its end, unless it has a result, and returns its AP. `start` holds what trained its weights."""
    result, settings_file = folder / "result.json", folder / "settings.yaml"
    # The start is compared by its settings, since the path of its weights depends on --output.
    compared = "---\n".join(_compared(study, trained) for trained in (start, settings) if trained)
    if settings_file.is_file() and settings_file.read_text(encoding="utf-8") != compared:
        raise RuntimeError(
            f"{folder} holds a run with other settings, see settings.yaml there. Remove the folder, or name another "
            "--output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(compared, encoding="utf-8")
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    command = [sys.executable, str(_TRAIN_NET), "--config-file", str(study.config), "--resume"]
    environment = {**os.environ, LAUNCHED: "1"}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(job % torch.cuda.device_count())
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")
    own = {"OUTPUT_DIR": str(folder)} | ({"MODEL.WEIGHTS": str(weights)} if weights else {})
    logger.info("Training %s", folder)
    console_file = folder / "console.txt"
    said_before = console_file.stat().st_size if console_file.is_file() else 0
    with open(console_file, "a", encoding="utf-8") as console:
        status = subprocess.run(
            [*command, *_words(settings | own)], stdout=console, stderr=console, env=environment
        ).returncode
    if status == 0:
        figures = _last_evaluation(folder / "metrics.json")
    elif _DIVERGED in console_file.read_bytes()[said_before:].decode(errors="replace"):
        figures = dict.fromkeys(_METRICS, float("nan"))
    else:
        raise RuntimeError(f"{folder}: training ended with status {status}; see console.txt there.")
    write_whole(result, lambda partial: Path(partial).write_text(json.dumps(figures) + "\n", encoding="utf-8"))
    # Not before: without a result the run would need its last checkpoint.
    for checkpoint in folder.glob("model_*.pth"):
        if checkpoint.name != "model_final.pth":
            checkpoint.unlink()
    return figures


def _compared(study: Study, settings: Settings) -> str:
    """The whole config, since CONFIG may change too, except keys that depend on the machine and change no result."""
    cfg = load_cfg(str(study.config), _words(settings)).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "", 0
    return cfg.dump()


def _last_evaluation(path: Path) -> dict[str, float]:
    for record in reversed(read_metrics(path)):
        if all(metric in record for metric in _METRICS):
            # Detectron2 gives NaN where nothing was predicted at all: no object was found, which is an AP of 0.
            return {metric: 0.0 if math.isnan(record[metric]) else record[metric] for metric in _METRICS}
    raise RuntimeError(
        f"{path} has no evaluation with {' and '.join(_METRICS)}: a study needs DATASETS.TEST and masks."
    )


def _backbone_alone(folder: Path) -> Path:
    """Writes the transformer of a run's final weights to a separate file."""
    path = folder / "backbone.pth"
    if not path.is_file():
        model = torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)["model"]
        # Its name in ViTDet and in Swin's detector.
        names = ("backbone.net.", "backbone.bottom_up.")
        backbone = {key: value for key, value in model.items() if key.startswith(names)}
        write_whole(path, lambda partial: torch.save({"model": backbone}, partial))
    return path


def _words(settings: Settings) -> list[str]:
    """KEY VALUE words of a command line."""
    return [word for key, value in settings.items() for word in (key, str(value))]


def _folder_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
