"""Publishes weights: a file in the names of our detectors, and a model card on how they were trained."""

import hashlib
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..yaml_file import read_yaml
from .files import read_weights, write_weights
from .layouts import LAYOUTS, convert_state
from .loading import check_weights_file
from .run_folder import read_metrics

logger = logging.getLogger(__name__)

# Names of measures among those that a run writes to metrics.json.
_MEASURE = re.compile(r"(.*/)?(AP(50|75|s|m|l)?|top-?[15])")


def convert_file(source: str, target: str) -> dict[str, Any]:
    """Writes the weights of a file, in any of the known layouts, under the names of our detectors.

    Sizes stay: loading resamples tensors to the tokens of the model at hand.

    Args:
        source: see `karat_det.checkpoint.files.read_weights`.
        target: see `karat_det.checkpoint.files.write_weights`.

    Returns:
        The rest of the file, as `read_weights` returns it.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the target.
        ValueError: the file cannot be read, its layout is unknown, or the target's suffix is.
    """
    check_weights_file(source, "IN")
    checkpoint = read_weights(source)
    in_file = checkpoint.pop("model")
    conversion = convert_state(in_file, checkpoint.pop("token_grids", {}))
    if not conversion.source:
        names = list(dict.fromkeys(key.partition(".")[0] for key in in_file))
        raise ValueError(
            f"{source} is of no known layout. Its names begin with {', '.join(names[:8])}. Known: {LAYOUTS}."
        )
    write_weights(target, conversion.state, conversion.token_grids, checkpoint.get("operator_config"))
    rows = [(key, reason) for key, reason in conversion.ignored.items()]
    logger.info("%s holds the weights of %s.", source, conversion.source)
    logger.info("Ignored: %d of its %d tensors\n%s", len(rows), len(in_file), tabulate(rows))
    logger.info("Written: %d tensors to %s", len(conversion.state), target)
    return checkpoint


def write_card(weights: str, run: str, checkpoint: dict[str, Any], *, commit: str = "", notes: str = "") -> str:
    """Writes a model card, in Markdown, beside a weights file.

    Args:
        weights: the file.
        run: OUTPUT_DIR of the weights' run, with config.yaml and metrics.json.
        checkpoint: the run's checkpoint without its weights. The card has its figures, which a classifier's has, else
            those of its iteration if that was evaluated, else the run's last.
        commit: the commit that trained them; "" is this working copy's, "unknown" if the package is in none.
        notes: text for users of the weights.

    Returns:
        Path of the card.

    Raises:
        FileNotFoundError: the run has no config.yaml or metrics.json.
        ValueError: they cannot be read, or hold no evaluation.
    """
    config_file, metrics_file = find_run(run)
    config = config_file.read_text(encoding="utf-8")
    try:
        values = read_yaml(config_file, "config")
        is_classifier = "DATA" in values
        if is_classifier:
            data = {"trained on": f"{values['DATA']['NAME']}, {values['DATA']['ROOT']}"}
        else:
            datasets = values["DATASETS"]
            data = {"trained on": ", ".join(datasets["TRAIN"]), "evaluated on": ", ".join(datasets["TEST"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{config_file} is no config of a run: it says nothing of its data ({error!r}).") from error
    iteration, figures = _figures(metrics_file, checkpoint)
    about = {
        "file": f"`{os.path.basename(weights)}`",
        "SHA-256": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        **data,
        "iterations": iteration + 1,
        "commit": commit or working_commit(),
    }
    card = Path(weights).with_suffix(".md")
    text = [
        f"# {card.stem}",
        *([notes] if notes else []),
        tabulate(about.items(), ("", ""), tablefmt="github", disable_numparse=True),
        "## Figures",
        tabulate(figures.items(), ("measure", "value"), tablefmt="github", floatfmt=".2f"),
        "## Config",
        "Of the classifier. The weights are its backbone's, for `MODEL.WEIGHTS` of a detector."
        if is_classifier
        else "Saved as YAML, it loads the weights with `--config-file` and `MODEL.WEIGHTS`.",
        f"```yaml\n{config.strip()}\n```",
    ]
    card.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return str(card)


def find_run(run: str) -> tuple[Path, Path]:
    """Paths of config.yaml and metrics.json in the OUTPUT_DIR of a run. FileNotFoundError where one is not there."""
    paths = Path(run) / "config.yaml", Path(run) / "metrics.json"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"--publish {run}: there is no {path}. Name the OUTPUT_DIR of a run.")
    return paths


def _figures(metrics_file: Path, checkpoint: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Iteration and measures of the evaluation that belongs to a checkpoint."""
    evaluations = {}
    for record in read_metrics(metrics_file):
        if measures := {key: value for key, value in record.items() if _MEASURE.fullmatch(key)}:
            evaluations[record["iteration"]] = measures
    iteration = checkpoint.get("iteration", checkpoint.get("trainer", {}).get("iteration"))
    own = checkpoint.get("figures")
    if isinstance(iteration, int) and isinstance(own, dict) and own:
        if iteration not in evaluations:
            logger.warning("No evaluation of iteration %s in %s: the card has the file's own.", iteration, metrics_file)
        return iteration, own
    if not evaluations:
        raise ValueError(f"{metrics_file} holds no evaluation: evaluate the run before publishing it.")
    if iteration not in evaluations:
        last = max(evaluations)
        logger.warning("No evaluation of iteration %s in %s: the card has that of %d.", iteration, metrics_file, last)
        iteration = last
    return iteration, evaluations[iteration]


def working_commit() -> str:
    """Commit of the working copy that the package lies in; "unknown" if none, or another project's, has it."""
    package = Path(__file__).resolve().parents[1]
    try:
        top, commit = (
            subprocess.run(
                ["git", "-C", str(package), "rev-parse", what], capture_output=True, text=True, check=True
            ).stdout.strip()
            for what in ("--show-toplevel", "HEAD")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit if Path(top).resolve() == package.parent else "unknown"
