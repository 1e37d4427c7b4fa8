"""Every key of both configs takes values of its default's type, however they are written, and no others."""

import pytest
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.config import add_karat_config, pretrain_config
from karat_det.engine.config_values import _LIKE, _OF_ANYTHING, leaves, merge_values, value_like


def detector_config():
    add_karat_config(cfg := get_cfg())
    return cfg


KEYS = {**dict(leaves(pretrain_config())), **dict(leaves(detector_config()))}


def test_what_each_key_may_hold_is_known():
    unknown = [key for key, default in KEYS.items() if default in (None, [], ())]
    assert set(unknown) - set(_LIKE) - _OF_ANYTHING == set()


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.STEPS", "[1, 2]", (1, 2)),
        ("SOLVER.STEPS", [1, 2], (1, 2)),
        ("SOLVER.STEPS", "()", ()),
        ("MODEL.KARAT.RANK", "None", None),
        ("MODEL.KARAT.RANK", None, None),
        ("MODEL.KARAT.NUM_KARAT_HEADS", "2", 2),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16.5]]", [[8.0], [16.5]]),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "0x1f", "0x1f"),
        ("OUTPUT_DIR", "a b?#%ü", "a b?#%ü"),
        ("OUTPUT_DIR", "'a'", "a"),
        ("MODEL.WEIGHTS", "", ""),
        ("DATASETS.TRAIN", "('a', 'b')", ("a", "b")),
    ],
)
def test_values_get_the_type_of_their_default(key, written, value):
    converted = value_like(key, written, KEYS[key])
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("key", "written", "words"),
    [
        ("SOLVER.BASE_LR", "None", "BASE_LR is None. It must be a number"),
        ("SOLVER.BASE_LR", float("nan"), "BASE_LR is nan. It must be a number"),
        ("SOLVER.MAX_ITER", "1e9", "MAX_ITER is 1e9. It must be a whole number"),
        ("SOLVER.MAX_ITER", "True", "MAX_ITER is True. It must be a whole number"),
        ("SOLVER.MAX_ITER", "", "MAX_ITER is ''. It must be a whole number"),
        ("SOLVER.MAX_ITER", "(" * 10_000, r"MAX_ITER is \(+… \(10,000 characters\)"),
        ("SOLVER.MAX_ITER", "9" * 5_000, "MAX_ITER is 9+…"),
        ("SOLVER.MAX_ITER", "-" * 50_000 + "1", "MAX_ITER is -+…"),
        ("SOLVER.STEPS", "3", "STEPS is 3. It must be a list of whole numbers"),
        ("SOLVER.STEPS", "(1, 'a')", "STEPS is .* a list of whole numbers"),
        ("MODEL.KARAT.BLOCKS", "[0.0]", r"BLOCKS is \[0\.0\]. It must be a list of whole numbers"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[8]", "SIZES is .* a list of lists of numbers"),
        ("MODEL.KARAT.ENABLED", "1", "ENABLED is 1. It must be True or False"),
        ("MODEL.KARAT.RANK", "'x'", "RANK is 'x'. It must be a whole number or None"),
        ("OUTPUT_DIR", "None", "OUTPUT_DIR is None. It must be text"),
        ("OUTPUT_DIR", 2024, "OUTPUT_DIR is 2024. It must be text"),
        ("OUTPUT_DIR", "a\0b", "OUTPUT_DIR is .*. It must be text"),
        ("DATASETS.TRAIN", "(1,)", r"TRAIN is \(1,\). It must be a list of texts"),
        ("TEST.EXPECTED_RESULTS", "3", "EXPECTED_RESULTS is 3. It must be a list"),
    ],
)
def test_values_of_another_type_are_refused_by_key(key, written, words):
    with pytest.raises(ValueError, match=words):
        value_like(key, written, KEYS[key])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"MODEL": 3}, "MODEL is 3. It must be a section, with keys such as LOAD_PROPOSALS"),
        ({"MODEL": None}, "MODEL is None. It must be a section"),
        ({"MODEL": {"VIT": []}}, "MODEL.VIT is .* a section"),
        ({"SOLVER": {"MAX_ITER": {"A": 1}}}, "SOLVER.MAX_ITER is .*a whole number"),
        ({"MODEL": {"KARAT": {"RNAK": {"A": 3}}}}, "There is no key MODEL.KARAT.RNAK.A"),
        ({"A": {}}, "There is no key A"),
    ],
)
def test_sections_and_keys_are_not_taken_for_each_other(content, complaint):
    with pytest.raises(ValueError, match=complaint):
        merge_values(detector_config(), content, [])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    key=st.sampled_from(sorted(KEYS)),
    written=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
    ),
    as_text=st.booleans(),
)
def test_a_value_is_of_the_default_s_type_or_an_error_names_its_key(key, written, as_text):
    try:
        value = value_like(key, str(written) if as_text else written, KEYS[key])
    except ValueError as error:
        assert str(error).startswith(f"{key} is ")
    else:
        default = KEYS[key]
        assert default is None or value is None or type(value) is type(default)
