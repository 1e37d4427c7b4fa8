"""Every YAML key that karat_det adds to Detectron2's, with its default.

What an operator is made of, in MODEL.KARAT, is explained in attention/config.py: each field of KArAtConfig is a key.
The defaults are those of ViT-Base at 224 × 224 with one universal Fourier operator of grid size 1 (G1U). Detectron2's
own keys keep Detectron2's defaults; the base YAML file of a family of models has its changes. These Detectron2 keys are
ignored: INPUT.MIN_SIZE_* and MAX_SIZE_* (INPUT.RESIZE sets the size of images) and DATALOADER.ASPECT_RATIO_GROUPING
(neither batch size nor number of processes changes the order of images). These are refused if they are set:
SOLVER.MOMENTUM, NESTEROV, BIAS_LR_FACTOR, WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS (the optimiser is AdamW), and the
others of _WITHOUT_EFFECT in engine/checks.py. The range of every key is in engine/ranges.py.
"""

from collections.abc import Mapping
from dataclasses import fields

from detectron2.config import CfgNode as CN
from fvcore.common.config import CfgNode

from .attention.config import KArAtConfig


def add_karat_config(cfg: CN) -> None:
    """Adds the keys of karat_det to a Detectron2 config, in place.

    Args:
        cfg: the config returned by `detectron2.config.get_cfg()`, not yet merged with a file.
    """
    _add_operator(cfg.MODEL)
    # What becomes of blocks among BLOCKS that attend to the whole image: "operator" (KArAt; fixes the image size),
    # "softmax" (no KArAt), or "window" (window blocks with KArAt).
    cfg.MODEL.KARAT.GLOBAL_BLOCKS = "operator"

    # Plain vision transformer and simple feature pyramid, built as Detectron2's ViT and SimpleFeaturePyramid.
    cfg.MODEL.VIT = CN()
    # Height of the input in pixels, and its width unless IMG_WIDTH gives one. Images are resized or padded to it.
    # Larger ones, from another Detectron2 pipeline, are refused if a global block has an operator.
    cfg.MODEL.VIT.IMG_SIZE = 224
    # Width of the input in pixels; 0 is IMG_SIZE, a square.
    cfg.MODEL.VIT.IMG_WIDTH = 0
    # Side of a patch, in pixels. It must divide height and width.
    cfg.MODEL.VIT.PATCH_SIZE = 16
    # Width, depth and heads: 192, 12, 3 is ViT-Tiny; 384, 12, 6 is ViT-Small; 768, 12, 12 is ViT-Base.
    cfg.MODEL.VIT.EMBED_DIM = 768
    cfg.MODEL.VIT.DEPTH = 12
    cfg.MODEL.VIT.NUM_HEADS = 12
    # Hidden width of the MLP over EMBED_DIM.
    cfg.MODEL.VIT.MLP_RATIO = 4.0
    # Bias of the query, key and value projection.
    cfg.MODEL.VIT.QKV_BIAS = True
    # Stochastic depth of the last block; it rises linearly from 0 in the first.
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1
    # Side of an attention window, in patches. If it does not divide the side of the image in patches, the windows at
    # the edge are padded. KArAt does not attend to the padding; Detectron2's softmax does.
    cfg.MODEL.VIT.WINDOW_SIZE = 14
    # Blocks that attend within windows; the others attend to the whole image.
    cfg.MODEL.VIT.WINDOW_BLOCKS = [0, 1, 3, 4, 6, 7, 9, 10]
    # Decomposed relative positions, added to the scores.
    cfg.MODEL.VIT.USE_REL_POS = True
    # Image size that the absolute position embedding is for, and whether it has a row for a class token.
    cfg.MODEL.VIT.PRETRAIN_IMG_SIZE = 224
    cfg.MODEL.VIT.PRETRAIN_USE_CLS_TOKEN = True
    # Levels of the pyramid, as factors of the patch grid's resolution.
    cfg.MODEL.VIT.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]

    # Swin and a feature pyramid, built as Detectron2's SwinTransformer and FPN: MODEL.BACKBONE.NAME
    # build_swin_karat_fpn_backbone. The defaults are Swin-Tiny. In MODEL.KARAT, SHARING must be "blockwise", BLOCKS
    # counts through all stages, and GLOBAL_BLOCKS has no effect: every block attends within windows.
    cfg.MODEL.SWIN = CN()
    # Height and width (0 is a square) of the input in pixels, to which images are resized or cropped. The backbone
    # itself takes any size.
    cfg.MODEL.SWIN.IMG_SIZE = 1024
    cfg.MODEL.SWIN.IMG_WIDTH = 0
    # Side of a patch, in pixels: the stride of the first stage, a power of 2. Each further stage halves the resolution.
    cfg.MODEL.SWIN.PATCH_SIZE = 4
    # Width of the first stage; each further one doubles it.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks of each stage and their heads. 96, [2, 2, 6, 2], [3, 6, 12, 24] is Swin-Tiny, 96, [2, 2, 18, 2],
    # [3, 6, 12, 24] Swin-Small, 128, [2, 2, 18, 2], [4, 8, 16, 32] Swin-Base.
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Side of an attention window, in tokens.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden width of the MLP over that of the stage.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Bias of the query, key and value projection.
    cfg.MODEL.SWIN.QKV_BIAS = True
    # Stochastic depth of the last block; it rises linearly from 0 in the first.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # Whether to add an absolute position embedding, and the image size that it is for.
    cfg.MODEL.SWIN.APE = False
    cfg.MODEL.SWIN.PRETRAIN_IMG_SIZE = 224
    # Stages of the pyramid: neighbours, from the finest. MODEL.FPN.IN_FEATURES has no effect.
    cfg.MODEL.SWIN.OUT_FEATURES = ["p0", "p1", "p2", "p3"]

    # True: a weights file with keys or shapes that the model does not have, or whose ViT or Swin lacks blocks, stops
    # the run. False: what fits is loaded.
    cfg.MODEL.WEIGHTS_STRICT = True

    # Learning rate of block i of L over that of the heads: LAYER_DECAY ** (L - i). 1.0 is one rate for all, the only
    # choice for Swin.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Learning rate of the operators' coefficients and projectors over their block's.
    cfg.SOLVER.OPERATOR_LR_FACTOR = 1.0
    # Minutes after which a run is saved as model_last.pth, beside CHECKPOINT_PERIOD; longer if saving would take more
    # than a fiftieth of the time; 0.0 is never.
    cfg.SOLVER.CHECKPOINT_MINUTES = 1.0
    # How many of CHECKPOINT_PERIOD's checkpoints are kept, the last ones; 0 is all. model_best.pth is always kept.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0
    _add_divergence(cfg.SOLVER)
    # AdamW's betas and epsilon.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.EPS = 1e-6

    # "fixed": resize to the model's height and width. "lsj": large-scale jitter and crop to them; test images keep
    # their shape.
    cfg.INPUT.RESIZE = "fixed"
    # Range of the factors that large-scale jitter draws from.
    cfg.INPUT.LSJ_SCALE = (0.1, 2.0)

    # The metric of the best checkpoint; "" is segm/AP with masks, else bbox/AP.
    cfg.TEST.BEST_METRIC = ""

    # Your own data in COCO format: dataset i is NAMES[i], annotated in JSONS[i], its images below IMAGE_DIRS[i].
    # DATASETS.TRAIN and DATASETS.TEST then choose among them, and among Detectron2's built-in names, by name.
    cfg.KARAT_DATA = CN()
    cfg.KARAT_DATA.NAMES = []
    cfg.KARAT_DATA.JSONS = []
    cfg.KARAT_DATA.IMAGE_DIRS = []


def pretrain_config() -> CfgNode:
    """Every YAML key of the pretraining of classifiers, with its default."""
    cfg = CN()
    # Version of Detectron2's config files.
    cfg.VERSION = 2
    cfg.MODEL = CN()
    # Name of a ViT, ConViT or Swin in timm.
    cfg.MODEL.NAME = "vit_tiny_patch16_224"
    # Changes to timm's model of that name; None keeps its own. Sides of the image and of a patch, in pixels; width,
    # which is the first stage's in Swin and fixed in ConViT; depth and heads of a ViT.
    cfg.MODEL.IMG_SIZE = None
    cfg.MODEL.PATCH_SIZE = None
    cfg.MODEL.EMBED_DIM = None
    cfg.MODEL.DEPTH = None
    cfg.MODEL.NUM_HEADS = None
    # Stochastic depth of the last block; it rises linearly from 0 in the first.
    cfg.MODEL.DROP_PATH_RATE = None
    # Initialisation of a ViT's weights: "" is timm's, of deviation 0.02; "jax" is the original ViT's, Xavier's, with
    # which a narrow ViT learns sooner.
    cfg.MODEL.WEIGHT_INIT = ""
    _add_operator(cfg.MODEL)
    _add_pretraining(cfg)
    return cfg


def _add_pretraining(cfg: CfgNode) -> None:
    """Adds data, recipe and evaluation to `pretrain_config`: the paper's for ViT on ImageNet-1K."""
    # As in Detectron2. Without a GPU it becomes "cpu".
    cfg.MODEL.DEVICE = "cuda"
    # True: a file of --init-from with keys or shapes that the model does not have, or without all its blocks, stops the
    # run. False: what fits is loaded. A head for another number of classes is left out in either case.
    cfg.MODEL.WEIGHTS_STRICT = True

    cfg.DATA = CN()
    # "folder": images in train/<class>/ and val/<class>/. "huggingface": a folder by datasets.DatasetDict.save_to_disk.
    # "digits": crops of the embedded digits, made if they are missing. Or the name of one of torchvision's datasets
    # that is on the disk, such as "CIFAR10"; datasets/README.md lists them.
    cfg.DATA.NAME = "folder"
    # The folder of the data, which --data names.
    cfg.DATA.ROOT = ""
    # Number of classes that the data must have; 0 is any number.
    cfg.DATA.NUM_CLASSES = 0
    # Mean and deviation of red, green and blue, on a scale from 0 to 1: ImageNet's. Google's ViTs in timm (augreg) need
    # 0.5 for all six.
    cfg.DATA.MEAN = (0.485, 0.456, 0.406)
    cfg.DATA.STD = (0.229, 0.224, 0.225)
    # Columns of a Hugging Face dataset.
    cfg.DATA.IMAGE_COLUMN = "image"
    cfg.DATA.LABEL_COLUMN = "label"

    cfg.DATALOADER = CN()
    # Processes that read and augment images, for each process that trains.
    cfg.DATALOADER.NUM_WORKERS = 8

    # Augmentation, by timm.
    cfg.AUG = CN()
    # The part of an image that is cut out: its area and its ratio of width to height.
    cfg.AUG.SCALE = (0.08, 1.0)
    cfg.AUG.RATIO = (0.67, 1.5)
    # Probability of a horizontal flip.
    cfg.AUG.FLIP = 0.5
    # RandAugment in timm's notation; "" is none.
    cfg.AUG.RAND_AUGMENT = "rand-m15-n2-mstd1.0-inc1"
    # Strength of colour jitter, which timm uses without RandAugment only.
    cfg.AUG.COLOR_JITTER = 0.4
    # Alpha of mixup and of cutmix; 0 is none. With both, one is drawn for each batch.
    cfg.AUG.MIXUP = 0.8
    cfg.AUG.CUTMIX = 1.0
    # Probability that a batch is mixed, and that a mixed one is by cutmix if both are on.
    cfg.AUG.MIX_PROB = 1.0
    cfg.AUG.CUTMIX_PROB = 0.5
    # Part of a label's weight that all classes share; 0 is none.
    cfg.AUG.LABEL_SMOOTHING = 0.1

    cfg.SOLVER = CN()
    # Passes over the training images.
    cfg.SOLVER.EPOCHS = 100
    # Images a step, over all processes.
    cfg.SOLVER.IMS_PER_BATCH = 128
    # AdamW's learning rate for 512 images a step; it is multiplied by IMS_PER_BATCH / 512.
    cfg.SOLVER.BASE_LR = 0.0005
    # The rate rises from WARMUP_LR for this number of epochs, and then falls to MIN_LR by a cosine.
    cfg.SOLVER.WARMUP_EPOCHS = 5
    cfg.SOLVER.WARMUP_LR = 1e-6
    cfg.SOLVER.MIN_LR = 1e-5
    # AdamW's decay rates of its two moving averages, and what is added to the root of the second one.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.EPS = 1e-6
    # Norms, biases, positions and the operators' coefficients have none.
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    # Decay of the moving average of the weights, which is evaluated and from which a detector starts. 0 is no average.
    # The decay is lower in the first steps, so that a short run does not end near its random weights: see ModelEmaV3 in
    # timm.
    cfg.SOLVER.EMA_DECAY = 0.99992
    # Minutes after which a run is saved as model_last.pth, beside the end of each epoch; longer if saving would take
    # more than a fiftieth of the time; 0.0 is never.
    cfg.SOLVER.CHECKPOINT_MINUTES = 1.0
    _add_divergence(cfg.SOLVER)
    # As in Detectron2; "full_model" clips by the norm of all gradients together.
    cfg.SOLVER.CLIP_GRADIENTS = CN()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # bfloat16. On the CPU it is off unless the command line sets it.
    cfg.SOLVER.AMP = CN()
    cfg.SOLVER.AMP.ENABLED = True

    cfg.TEST = CN()
    # Epochs between evaluations. The last epoch is always evaluated.
    cfg.TEST.EVAL_PERIOD = 1
    # Side of a validation image's centre crop over that of the image.
    cfg.TEST.CROP_RATIO = 0.9

    # Seed of weights, order of the data and augmentation. A resumed run equals an uninterrupted one.
    cfg.SEED = 0
    # The folder of checkpoints, log and metrics. It is made if it is missing.
    cfg.OUTPUT_DIR = "output/pretrain"


def _add_divergence(solver: CfgNode) -> None:
    """Adds to SOLVER the keys of divergence."""
    # Reaction to divergence. "skip_not_finite": a step whose loss or gradient is not finite updates nothing. "skip":
    # nor does a step whose gradient's norm is over SPIKE_FACTOR times its running median. "rollback": in both cases the
    # run goes back to the weights of the last checkpoint, and on with the following images at half the learning rate.
    # "stop": a loss or gradient that is not finite ends the run. An update that overflows ends the run too, except with
    # "rollback".
    solver.ON_DIVERGENCE = "skip_not_finite"
    # Most steps to skip in a row; the next one ends the run.
    solver.MAX_SKIPPED_STEPS = 5
    # See "skip": how many times its running median the norm of the gradient may be.
    solver.SPIKE_FACTOR = 20.0
    # Most times that a run goes back; the next time ends it.
    solver.MAX_ROLLBACKS = 3


def _add_operator(model: CfgNode) -> None:
    """Adds MODEL.KARAT, as detectors and classifiers have it, to MODEL."""
    # The operator: the fields of KArAtConfig in upper case, with their defaults. That class explains them. The keys
    # below place operators in a network.
    model.KARAT = type(model)({field.name.upper(): field.default for field in fields(KArAtConfig)})
    # False builds the softmax model, Detectron2's or timm's own, parameter for parameter: the baseline of every
    # comparison.
    model.KARAT.ENABLED = True
    # "blockwise": each block has its own operator. "universal": all blocks share one.
    model.KARAT.SHARING = "universal"
    # Indices of the blocks that get KArAt; [] is all. The others stay as they are in the softmax model.
    model.KARAT.BLOCKS = []


def image_size(cfg: CN) -> tuple[int, int]:
    """(height, width), in pixels, of the images that the model takes."""
    model = cfg.MODEL.SWIN if cfg.MODEL.BACKBONE.NAME == "build_swin_karat_fpn_backbone" else cfg.MODEL.VIT
    return model.IMG_SIZE, model.IMG_WIDTH or model.IMG_SIZE


def named_by_key(
    error: ValueError, notes: Mapping[str, str] | None = None, keys: Mapping[str, str] | None = None
) -> ValueError:
    """An error about an argument of KArAtConfig or replace_attention, with the name of the argument's key.

    Args:
        error: its message begins with the name of the argument.
        notes: by argument, an addition to the message for users of YAML.
        keys: by argument, its key, unless that is the upper-case name in MODEL.KARAT.
    """
    argument, _, complaint = str(error).partition(" ")
    key = (keys or {}).get(argument, f"MODEL.KARAT.{argument.upper()}")
    return ValueError(f"{key} {complaint} {(notes or {}).get(argument, '')}".rstrip())


def karat_config(cfg: CfgNode) -> KArAtConfig:
    """Reads the operator's config from MODEL.KARAT, of either config: its fields, in upper case, are keys there.

    Raises:
        ValueError: a key has a value that is not allowed.
    """
    try:
        return KArAtConfig(**{field.name: cfg.MODEL.KARAT[field.name.upper()] for field in fields(KArAtConfig)})
    except ValueError as error:
        raise named_by_key(error) from None
