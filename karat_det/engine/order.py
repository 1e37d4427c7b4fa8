"""The order of a run's images, and all its random draws: functions of a seed and of a count of images.

The images come in an endless sequence of epochs, each shuffled by itself. A place in it is a whole number: the count of
images before it. Draws for the image at a place depend on the seed and the place alone; draws in a step depend on the
seed, the place of its first image and the process. So neither workers nor processes change an image, and a
checkpoint that has seed and place has every random state: each image and each step sets Python's, NumPy's and torch's
generators anew.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Dataset, Sampler

logger = logging.getLogger(__name__)

# Purposes of random draws.
_EPOCH, _SUBSET, _IMAGE, _BATCH, _STEP = range(5)
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")


class ImageOrder(Sampler):
    """The sequence of a run's images, and the run's place in it. As a sampler, it yields this process's places.

    Args:
        repeat_factors: (number of images,) how often an epoch has each; for the fraction, each epoch draws whether it
            has the image once more.
        seed: at least 0; for a negative one, a seed is drawn, the same for all processes.
        subset_size: how many images, chosen by the seed, to use; default all. Needs factors of 1.

    Attributes:
        seed: the seed.
        place: number of images that all processes have taken: the place of the next one. It may be set before
            iteration.
    """

    def __init__(self, repeat_factors: Tensor, seed: int, subset_size: int | None = None):
        self.is_drawn = seed < 0
        self.seed = comm.shared_random_seed() if self.is_drawn else seed
        self.place = 0
        self._whole = repeat_factors.floor().long()
        self._fraction = repeat_factors - self._whole
        self._subset_size = subset_size
        self._forget()

    def __len__(self) -> int:
        """Images in the data, of which an epoch may have less or more."""
        return len(self._whole)

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.place + comm.get_rank(), comm.get_world_size())

    def steps(self, images_per_step: int, whole_epochs: bool = False) -> Iterator[int]:
        """The places at which steps begin, from the present one on.

        Args:
            images_per_step: of all processes together.
            whole_epochs: whether no step has images of two epochs: then the last of an epoch, too few for a step, are
                left out. For factors of 1.
        """
        place = self.place
        while True:
            if whole_epochs and place % len(self) + images_per_step > len(self):
                place += len(self) - place % len(self)
            yield place
            place += images_per_step

    def image_at(self, place: int) -> int:
        """Index of the image at a place."""
        number, first, images = self._epoch
        if not first <= place < first + len(images):
            if self._fraction.any():
                # Epochs differ in length: a pass over the images for each that is skipped.
                if place < first:
                    number, first = 0, 0
                while place >= first + (length := len(self._images_of(number))):
                    number, first = number + 1, first + length
            else:
                length = self._subset_size or int(self._whole.sum())
                number = place // length
                first = number * length
            images = self._images_of(number)
            images = images[torch.randperm(len(images), generator=self._generator(number))]
            self._epoch = number, first, images
        return int(images[place - first])

    def _forget(self) -> None:
        # Number, first place and images of the epoch of the last look-up.
        self._epoch = 0, 0, self._whole[:0]

    def _images_of(self, epoch: int) -> Tensor:
        """The images of an epoch, not yet shuffled."""
        if self._subset_size:
            generator = torch.Generator().manual_seed(int(_words(self.seed, _SUBSET)[0]))
            return torch.randperm(len(self), generator=generator)[: self._subset_size]
        more = torch.rand(len(self), generator=self._generator(epoch, 1)) < self._fraction
        return torch.arange(len(self)).repeat_interleave(self._whole + more)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(_words(self.seed, _EPOCH, *key)[0]))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "place": self.place, "images": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a checkpoint's place.

        A seed that was not drawn remains, and so does the data: the log says where they are not the checkpoint's.

        Raises:
            ValueError: the state is none that `state_dict` gives.
        """
        if not isinstance(state, dict) or not all(
            type(state.get(key)) is int and 0 <= state[key] < 2**63 for key in ("seed", "place", "images")
        ):
            raise ValueError(f"The place in the order of images is {state!r}, which is none.")
        self.place = state["place"]
        self._forget()
        if self.is_drawn:
            self.seed = state["seed"]
        elif self.seed != state["seed"]:
            logger.warning(
                "SEED is %d, and was %d so far: from here on the images come in another order.",
                *(self.seed, state["seed"]),
            )
        if state["images"] != len(self):
            logger.warning(
                "There are %d images to train on, and were %d so far: from here on they come in another order.",
                *(len(self), state["images"]),
            )


class SeededImages(Dataset):
    """Images by their places in an order; random transforms draw the same for a place, whichever process reads it.

    Args:
        images: by index. Reading one may draw at random.
        order: the order.
        mapper: makes the model's input from an image; default the image itself.
    """

    def __init__(self, images: Sequence[Any], order: ImageOrder, mapper: Callable[[Any], Any] | None = None):
        self.images = images
        self.order = order
        self.mapper = mapper

    def __getitem__(self, place: int) -> Any:
        index = self.order.image_at(place)
        seed_all(self.order.seed, _IMAGE, place)
        image = self.images[index]
        return self.mapper(image) if self.mapper else image

    def __getitems__(self, places: list[int]) -> list[Any]:
        """A batch, as torch's loaders ask for it; the collate function may draw at random too."""
        batch = [self[place] for place in places]
        seed_all(self.order.seed, _BATCH, places[0])
        return batch


class EpochBatches(Sampler):
    """The places of each of this process's batches, where no batch has images of two epochs.

    Args:
        order: the order; its factors are 1.
        images_per_step: of all processes together.
    """

    def __init__(self, order: ImageOrder, images_per_step: int):
        self.order = order
        self.images_per_step = images_per_step

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.order.steps(self.images_per_step, whole_epochs=True):
            yield list(range(start + comm.get_rank(), start + self.images_per_step, comm.get_world_size()))


class CountedLoader:
    """A loader of batches that counts the images, and seeds the draws of a step.

    Args:
        loader: of this process's batches from `order.place` on.
        order: the order.
        images_per_step, whole_epochs: as for `ImageOrder.steps`.
    """

    def __init__(self, loader: Iterable[Any], order: ImageOrder, images_per_step: int, whole_epochs: bool = False):
        self.loader = loader
        self.order = order
        self.images_per_step = images_per_step
        self.whole_epochs = whole_epochs

    def __iter__(self) -> Iterator[Any]:
        starts = self.order.steps(self.images_per_step, self.whole_epochs)
        for start, batch in zip(starts, self.loader, strict=False):
            seed_all(self.order.seed, _STEP, start, comm.get_rank())
            self.order.place = start + self.images_per_step
            yield batch


def build_order(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> ImageOrder:
    """Builds the order of images of a detector's training, as DATALOADER.SAMPLER_TRAIN and SEED say.

    Args:
        cfg: a config with Detectron2's keys.
        records: all records to train on.

    Raises:
        ValueError: a key has a value that is not allowed.
    """
    loader = cfg.DATALOADER
    factors, subset_size = torch.ones(len(records)), None
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, loader.REPEAT_THRESHOLD, sqrt=loader.REPEAT_SQRT
        )
    elif loader.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        subset_size = int(len(records) * loader.RANDOM_SUBSET_RATIO)
        if not 1 <= subset_size <= len(records):
            raise ValueError(
                f"DATALOADER.RANDOM_SUBSET_RATIO is {loader.RANDOM_SUBSET_RATIO}: {subset_size} of {len(records)} "
                "images. It must be above 0 and at most 1, and leave one image at least."
            )
    elif loader.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {loader.SAMPLER_TRAIN!r}, which is unknown here. Known: "
            f"{', '.join(SAMPLERS)}."
        )
    return ImageOrder(factors, cfg.SEED, subset_size)


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch, on all devices, from integers of at least 0."""
    words = _words(*key)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:6])
    # Its generator on the CPU takes no more than 32 bits.
    torch.manual_seed(int(words[6]))


def _words(*key: int) -> np.ndarray:
    """Eight words of 32 bits that look random."""
    return np.random.SeedSequence(key).generate_state(8)
