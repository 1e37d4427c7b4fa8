"""Checks the levels of a feature pyramid against those that the heads of a detector read."""

from detectron2.config import CfgNode


def check_levels(cfg: CfgNode, levels: list[str], made_of: str) -> None:
    """Checks that the heads read levels that the pyramid has, and that each of the RPN's has its anchors.

    Args:
        cfg: the detector's config.
        levels: names of the pyramid's levels.
        made_of: the keys of the levels, with their values, for the message.

    Raises:
        ValueError: a head reads another level, or the number of anchor sizes is not that of the RPN's levels.
    """
    heads = ("RETINANET",) if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else ("RPN", "ROI_HEADS")
    for head in heads:
        if not set(cfg.MODEL[head].IN_FEATURES) <= set(levels):
            raise ValueError(
                f"MODEL.{head}.IN_FEATURES is {cfg.MODEL[head].IN_FEATURES}. With {made_of} the levels are {levels}."
            )
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    if len(sizes) not in (1, len(cfg.MODEL[heads[0]].IN_FEATURES)):
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {sizes}. It must have one list of sizes for each of MODEL.{heads[0]}."
            f"IN_FEATURES, {cfg.MODEL[heads[0]].IN_FEATURES}."
        )
