import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image

from karat_det.analysis.study import Study, write_report


@pytest.fixture
def content(configs):
    return {
        "CONFIG": str(configs / "quickstart.yaml"),
        "SETTINGS": {"SOLVER.MAX_ITER": 5},
        "SEEDS": [1, 2],
        "STARTS": {"random": {}, "softmax": {"MODEL.KARAT.ENABLED": False}},
        "VARIANTS": {"softmax": {"MODEL.KARAT.ENABLED": False}, "G3B": {"MODEL.KARAT.GRID_SIZE": 3}},
    }


def load(content, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return Study.load(path)


def test_runs_go_seed_by_seed_through_all_starts_and_variants(content, tmp_path):
    runs = list(load(content, tmp_path).runs())
    assert runs[:4] == [
        ("softmax", "random", 1),
        ("G3B", "random", 1),
        ("softmax", "softmax", 1),
        ("G3B", "softmax", 1),
    ]
    assert [seed for _, _, seed in runs] == [1] * 4 + [2] * 4


def test_the_projects_study_is_one(configs):
    study = Study.load(configs.parent / "studies" / "digits.yaml")
    assert len(list(study.runs())) == len(study.variants) * 2 * 3
    assert next(iter(study.variants)) == "softmax"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"SEEDS": []}, "SEEDS is"),
        ({"VARIANTS": {}}, "VARIANTS is"),
        ({"STARTS": ["random"]}, "STARTS is"),
        ({"VARIANTS": {"a": None}}, "VARIANTS 'a' is None"),
        (
            {"VARIANTS": {"a": {"MODEL.KARAT.GRIDSIZE": 3}}},
            "VARIANTS 'a', with SETTINGS: There is no key",
        ),
        ({"SETTINGS": {"SOLVER.MAX_ITER": "many"}}, "override does not fit"),
        ({"MORE": 1}, "must have the keys CONFIG, SETTINGS"),
        ({"SEEDS": [1, 2, 1]}, r"SEEDS is \[1, 2, 1\]. Each may be there once"),
        ({"VARIANTS": {"a + b": {}, "a × b": {}}}, "two of VARIANTS differ only in signs"),
        ({"VARIANTS": {"a": {"MODEL.KARAT.RANK": 1000}}}, "MODEL.KARAT.RANK is 1000, above N"),
        ({"CONFIG": "nowhere.yaml"}, "nowhere.yaml"),
        ({"SETTINGS": {"MODEL.MASK_ON": False}}, "it needs masks"),
        ({"SETTINGS": {"DATASETS.TEST": "()"}}, "a dataset to evaluate on"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_anything_is_trained(content, tmp_path, changes, complaint):
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        load(content | changes, tmp_path)


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        Study.load(tmp_path / "no.yaml")


def test_the_table_has_means_deviations_differences_and_what_diverged(content, tmp_path):
    study = load(content, tmp_path)
    figures = {
        ("softmax", "random"): (40.0, 42.0),
        ("G3B", "random"): (41.0, 44.0),
        ("softmax", "softmax"): (50.0, 50.5),
        ("G3B", "softmax"): (math.nan, 49.0),
    }
    results = [
        {"variant": variant, "start": start, "seed": seed, "segm/AP": mask_ap, "bbox/AP": mask_ap + 10}
        for (variant, start), pair in figures.items()
        for seed, mask_ap in zip((1, 2), pair, strict=True)
    ]
    np.random.default_rng(0).shuffle(results)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in write_report(study, results, tmp_path).split("\n")
    ]
    assert rows[0] == [
        "variant",
        *("from random: mask AP", "against softmax", "box AP"),
        *("from softmax: mask AP", "against softmax", "box AP"),
    ]
    assert rows[2] == ["softmax", "41.0 ± 1.4", "", "51.0 ± 1.4", "50.2 ± 0.4", "", "60.2 ± 0.4"]
    assert rows[3][:4] == ["G3B", "42.5 ± 2.1", "+1.5", "52.5 ± 2.1"]
    assert rows[3][4:6] == ["49.0 (1 of 2 diverged)", "-1.5"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 8
    assert Image.open(tmp_path / "plot.png").width > 500


def test_a_variant_that_always_diverges(content, tmp_path):
    study = load(content, tmp_path)
    results = [
        {"variant": v, "start": s, "seed": k, "segm/AP": 1.0 if v == "softmax" else math.nan, "bbox/AP": 1.0}
        for v, s, k in study.runs()
    ]
    assert "| diverged" in write_report(study, results, tmp_path)


def test_a_baseline_that_always_diverges_compares_with_nothing(content, tmp_path):
    study = load(content, tmp_path)
    results = [
        {"variant": v, "start": s, "seed": k, "segm/AP": math.nan if v == "softmax" else 1.0, "bbox/AP": 1.0}
        for v, s, k in study.runs()
    ]
    row = write_report(study, results, tmp_path).splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["1.0 ± 0.0", ""]


def test_a_study_that_is_under_way_compares_the_seeds_that_both_have(content, tmp_path):
    study = load(content, tmp_path)
    figures = {("softmax", 1): 40.0, ("softmax", 2): 50.0, ("G3B", 2): 51.0}
    results = [
        {"variant": variant, "start": "random", "seed": seed, "segm/AP": mask_ap, "bbox/AP": 1.0}
        for (variant, seed), mask_ap in figures.items()
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in write_report(study, results, tmp_path).split("\n")
    ]
    assert rows[2][1] == "45.0 ± 7.1"
    assert rows[3][1:4] == ["51.0 (1 of 2 seeds)", "+1.0", "1.0 (1 of 2 seeds)"]
    assert rows[3][4:] == ["not yet run", "", "not yet run"]
