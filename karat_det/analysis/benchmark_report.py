"""Results of a benchmark: its rows, and the table and the plot of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_UNITS = {"ms": 1e-3, "s": 1.0, "MiB": 2.0**20, "million multiply-adds": 1e6, "images/s": 1.0}


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        measured: the quantity.
        over: the other one, which it is compared with.
        value, reference: the two, in seconds, bytes, multiply-adds or images a second.
        unit: the unit of the table, a key of _UNITS.
        goal: the largest allowed ratio on two CPU cores with the default sizes, if there is one.
    """

    measured: str
    over: str
    value: float
    reference: float
    unit: str
    goal: float | None = None

    @property
    def ratio(self) -> float:
        return self.value / self.reference


@dataclass(frozen=True)
class ScalingPoint:
    """One attention core at one number of tokens: seconds of forward and backward, bytes of memory they add."""

    variant: str
    num_tokens: int
    seconds: float
    peak_bytes: int


@dataclass
class Results:
    """Results of a benchmark on one machine."""

    machine: str
    comparisons: list[Comparison] = field(default_factory=list)
    scaling: list[ScalingPoint] = field(default_factory=list)


def write_report(results: Results, output_dir: str | Path) -> str:
    """Writes results.json, table.md where rows were measured, and scaling.png where scaling was.

    Returns:
        The table, in Markdown.
    """
    output_dir = Path(output_dir)
    rows = [{**asdict(comparison), "ratio": comparison.ratio} for comparison in results.comparisons]
    content = {**asdict(results), "comparisons": rows}
    (output_dir / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = f"Measured on {results.machine}. A ratio of 1.00 is what the other one takes; less is better. "
    table += "What it must be is for two CPU cores, and the default sizes and config.\n"
    if rows:
        table += "\n" + tabulate(
            [
                (
                    c.measured,
                    c.over,
                    f"{c.ratio:.2f}",
                    "" if c.goal is None else f"≤ {c.goal:.2f}" + (", missed" if c.ratio > c.goal else ""),
                    f"{_shown(c.value, c.unit)} : {_shown(c.reference, c.unit)} {c.unit}",
                )
                for c in results.comparisons
            ],
            ("measured", "compared with", "ratio", "must be", "values"),
            tablefmt="github",
            disable_numparse=True,
        )
        table += "\n"
    if results.scaling:
        tokens = sorted({point.num_tokens for point in results.scaling})
        points = {(point.variant, point.num_tokens): point for point in results.scaling}
        table += "\nForward + backward of one image, 12 heads of 64, over N tokens: time, peak memory added.\n\n"
        table += tabulate(
            [
                [
                    name,
                    *(
                        f"{_shown(points[name, n].seconds, 'ms')} ms, {_shown(points[name, n].peak_bytes, 'MiB')} MiB"
                        if (name, n) in points
                        else "left out"
                        for n in tokens
                    ),
                ]
                for name in dict.fromkeys(point.variant for point in results.scaling)
            ],
            ("attention core", *(f"N = {n}" for n in tokens)),
            tablefmt="github",
            disable_numparse=True,
        )
        table += "\n"
        plot_scaling(results.scaling, output_dir / "scaling.png")
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    return table


def plot_scaling(points: Sequence[ScalingPoint], path: str | Path) -> None:
    """Draws time and peak memory over the number of tokens, both axes logarithmic, a line for each variant."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    tokens = sorted({point.num_tokens for point in points})
    for panel, attribute, unit, title in (
        (panels[0], "seconds", "ms", "time of forward + backward"),
        (panels[1], "peak_bytes", "MiB", "peak memory that they add"),
    ):
        for name in dict.fromkeys(point.variant for point in points):
            line = sorted((p.num_tokens, getattr(p, attribute) / _UNITS[unit]) for p in points if p.variant == name)
            panel.plot(*zip(*line, strict=True), "o-", markersize=4, label=name)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(tokens, tokens)
        panel.minorticks_off()
        panel.set_xlabel("N, tokens that attend to each other")
        panel.set_ylabel(unit)
        panel.set_title(title)
        panel.grid(color="0.9")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shown(value: float, unit: str) -> str:
    value /= _UNITS[unit]
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
