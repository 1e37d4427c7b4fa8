"""Images that cannot be read: a few are skipped, each named once; more end the run."""

import logging

import torch

logger = logging.getLogger(__name__)

# One image in this many may be broken.
BROKEN_IN = 1000


class TooManyBroken(ValueError):
    """More images cannot be read than may be skipped."""


class BrokenImages:
    """Marks the broken images of a set, for all processes of a loader together.

    Args:
        total: how many images there are.
        place: the user's name for them.

    Attributes:
        seen: (total,) bool, True where an image was found broken.
    """

    def __init__(self, total: int, place: str):
        self.place = place
        # Shared with the loader's processes.
        self.seen = torch.zeros(total, dtype=torch.bool).share_memory_()

    def add(self, index: int, error: OSError) -> None:
        """Names a broken image in the log.

        Raises:
            TooManyBroken: it is one too many.
        """
        self.seen[index] = True
        count, total = int(self.seen.sum()), len(self.seen)
        if count * BROKEN_IN > total:
            raise TooManyBroken(
                f"{error} It is broken image {count} of the {total} of {self.place}, and no more than 1 in "
                f"{BROKEN_IN} may be skipped."
            ) from error
        logger.warning("Skipped, %d of at most %d: %s", count, total // BROKEN_IN, error)
