"""The order of images, and what is drawn for each, by any number of workers and processes and after any stop."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.engine.order import CountedLoader, ImageOrder, SeededImages, build_order, seed_all


def drawn(index):
    """A random transform: draws from each generator."""
    return index, random.random(), np.random.rand(), torch.rand(1).item()


def batches_from(place, count, *, seed=5, size=7, batch=4, workers=0):
    """`count` batches of this process from a place on, and what a step draws behind each."""
    order = ImageOrder(torch.ones(size), seed)
    order.place = place
    images = SeededImages(range(100, 100 + size), order, drawn)
    loader = build_detection_train_loader(
        images, mapper=None, sampler=order, total_batch_size=batch, aspect_ratio_grouping=False, num_workers=workers
    )
    batches = iter(CountedLoader(loader, order, batch))
    return [(next(batches), drawn(-1), order.place) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_drawn_is_the_same_with_any_workers_and_from_any_place(workers):
    unbroken = batches_from(0, 5)
    indices = [draws[0] for batch, *_ in unbroken for draws in batch]
    assert sorted(indices[:7]) == list(range(100, 107)) != indices[:7]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert batches_from(0, 2, workers=workers) + batches_from(8, 3) == unbroken
    assert len({draws for batch, step, _ in unbroken for draws in (*batch, step)}) == 5 * (4 + 1)


def test_processes_share_each_step_of_one_order(monkeypatch):
    alone = batches_from(0, 4)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches_from(0, 4, workers=rank * 2))
    for (batch, step, place), (first, step_0, place_0), (second, step_1, place_1) in zip(alone, *shares, strict=True):
        # Image by image in turn.
        assert [draws for pair in zip(first, second, strict=True) for draws in pair] == batch
        assert place == place_0 == place_1
        # Each process draws its own in a step.
        assert step == step_0 != step_1
    # In batches of another size they come in the same order.
    wider = [draws for batch, *_ in batches_from(0, 2, batch=8) for draws in batch]
    assert wider == [draws for batch, *_ in alone for draws in batch][1::2]


@settings(deadline=None, max_examples=30)
@given(
    factors=st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.25]), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    places=st.lists(st.integers(0, 400), max_size=5),
)
def test_any_place_is_looked_up_as_if_all_before_it_had_been(factors, seed, places):
    one_by_one, jumping = (ImageOrder(torch.tensor(factors), seed) for _ in range(2))
    sequence = [one_by_one.image_at(place) for place in range(401)]
    assert [jumping.image_at(place) for place in places] == [sequence[place] for place in places]
    # Each epoch has each image as often as its factor says.
    if all(factor.is_integer() for factor in factors):
        length = int(sum(factors))
        expected = sorted(i for i, factor in enumerate(factors) for _ in range(int(factor)))
        for start in range(0, 401 - length, length):
            assert sorted(sequence[start : start + length]) == expected


def test_factors_hold_on_average_and_epochs_are_shuffled_anew():
    order = ImageOrder(torch.tensor([1.0, 1.5, 2.25]), seed=3)
    sequence = [order.image_at(place) for place in range(4750)]
    assert np.bincount(sequence) / 1000 == pytest.approx([1.0, 1.5, 2.25], rel=0.05)
    order = ImageOrder(torch.ones(20), seed=3)
    epochs = [[order.image_at(place) for place in range(start, start + 20)] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_end_of_coco_is_skipped_to_in_a_second(factor):
    order = ImageOrder(torch.full((118_287,), factor), seed=0)
    start = time.perf_counter()
    order.image_at(184_375 * 64)
    assert time.perf_counter() - start < 5


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.SEED = 7
    return cfg


RECORDS = [{"annotations": [{"category_id": 0}]}] * 15 + [{"annotations": [{"category_id": 1}]}]


def test_detectron2s_samplers_choose_the_images(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.25
    order = build_order(cfg, RECORDS)
    # One of 16 images has the category: √(0.25 · 16) = 2 times.
    assert sorted(order.image_at(place) for place in range(17)) == [*range(16), 15]
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.25
    order = build_order(cfg, RECORDS)
    epochs = [{order.image_at(place) for place in range(start, start + 4)} for start in range(0, 40, 4)]
    assert len(epochs[0]) == 4 and all(epoch == epochs[0] for epoch in epochs)
    cfg.SEED = 8
    assert {build_order(cfg, RECORDS).image_at(place) for place in range(4)} != epochs[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SAMPLER_TRAIN", "WeightedTrainingSampler", r"SAMPLER_TRAIN is 'WeightedTrainingSampler', .* Known: Training"),
        ("RANDOM_SUBSET_RATIO", 0.01, r"RANDOM_SUBSET_RATIO is 0\.01: 0 of 16 images"),
        ("RANDOM_SUBSET_RATIO", 2.0, r"RANDOM_SUBSET_RATIO is 2\.0: 32 of 16 images"),
    ],
)
def test_other_samplers_are_refused_by_name(cfg, key, value, message):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER[key] = value
    with pytest.raises(ValueError, match=message):
        build_order(cfg, RECORDS)


def test_a_drawn_seed_is_kept_in_the_checkpoint_and_a_given_one_in_the_config(caplog):
    seed_all(1)
    first = ImageOrder(torch.ones(9), seed=-1)
    first.place = 12
    second = ImageOrder(torch.ones(9), seed=-1)
    assert second.seed != first.seed
    second.image_at(0)
    second.load_state_dict(first.state_dict())
    assert [second.image_at(place) for place in range(12, 30)] == [first.image_at(place) for place in range(12, 30)]
    assert second.place == 12 and not caplog.text
    given_one = ImageOrder(torch.ones(8), seed=4)
    given_one.load_state_dict(first.state_dict())
    assert given_one.seed == 4 and f"SEED is 4, and was {first.seed} so far" in caplog.text
    assert "There are 8 images to train on, and were 9 so far" in caplog.text


@pytest.mark.parametrize("state", [None, 3, {}, {"seed": -1, "place": 0, "images": 1}, {"seed": 0, "place": True}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="place in the order of images is"):
        ImageOrder(torch.ones(9), seed=0).load_state_dict(state)


def test_seeds_of_different_keys_differ_in_every_generator():
    draws = []
    for key in itertools.product(range(3), range(3), (0, 1, 2**40)):
        seed_all(*key)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    for values in zip(*draws, strict=True):
        assert len(set(values)) == 27
