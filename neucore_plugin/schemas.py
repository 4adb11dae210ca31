"""What a config may say: one pydantic model a section, with defaults and ranges. Knows neither torch nor lavis.

Other builders, models, backbones and processors add theirs with the `register_*_schema` functions; what has no schema
is passed through unchecked (the host's own).
"""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from neucore_plugin.names import nearest

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
PARTS_OF_SPEECH = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN")
PARTS_OF_SPEECH += ("PUNCT", "SCONJ", "SYM", "VERB", "X")  # the universal tags, as spaCy gives them
LR_SCHEDULERS = ("linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr")
OUR_RUNNERS = ("runner_cir", "runner_cir_iter")
OUR_TASKS = ("composed_image_retrieval",)
CIRR_SPLITS = ("train", "val")
EMOJI_SPLITS = ("train", "val", "test_combo", "test_role", "test_word", "test_two")


class Section(BaseModel):
    """Base of every schema: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# --- kinds of values: each gives exactly one error, which says what is allowed ---------------------------------------


def refuse(allowed: str, hint: str = "") -> PydanticCustomError:
    """The error of a value that is not `allowed`; `hint` names the nearest valid one."""
    return PydanticCustomError("not_allowed", "{allowed}{hint}", {"allowed": allowed, "hint": hint})


def _within(value: float, low: float | None, high: float | None, above: float | None, below: float | None) -> bool:
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _range(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    bounds = (("at least", low), ("at most", high), ("greater than", above), ("less than", below))
    text = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
    return f"of {text}" if text.startswith("at") else text


def whole(low: int | None = None, high: int | None = None, multiple: int = 1) -> Any:
    """A whole number within bounds; neither a truth value nor a text nor 2.0."""
    allowed = f"a whole number {_range(low, high, None, None)}".rstrip()
    allowed += f", a multiple of {multiple}" if multiple > 1 else ""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not _within(value, low, high, None, None):
            raise refuse(allowed)
        if value % multiple:
            raise refuse(allowed)
        return value

    return Annotated[int, PlainValidator(check)]


def real(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A finite number within bounds; also a text such as "1e-4", which YAML 1.1 does not read as a number."""
    allowed = f"a number {_range(low, high, above, below)}".rstrip()

    def check(value: Any) -> float:
        if isinstance(value, str) and _SCIENTIFIC.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(allowed)
        if not _within(value, low, high, above, below):
            raise refuse(allowed)
        return float(value)

    return Annotated[float, PlainValidator(check)]


def choice(*values: Any) -> Any:
    """One of `values`; 1 is not true."""
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise _not_among(value, words)
        return value

    return Annotated[Any, PlainValidator(check)]


def _not_among(value: Any, words: Iterable[str]) -> PydanticCustomError:
    hint, _, allowed = nearest(str(value), words).rpartition(" Allowed: ")
    return refuse(f"one of {allowed.rstrip('.')}", f".{hint}" if hint else "")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise refuse("a text that is not empty")
    return value


def words(among: Iterable[str] | None = None, at_least: int = 0) -> Any:
    """A list of texts, none twice, optionally each among given ones."""
    known = None if among is None else tuple(among)
    allowed = "a list of names, none twice" if not at_least else f"a list of at least {at_least} names, none twice"

    def check(value: Any) -> list[str]:
        if not isinstance(value, list) or len(value) < at_least or not all(isinstance(one, str) for one in value):
            raise refuse(allowed + (f", among {', '.join(known)}" if known else ""))
        if len(set(value)) < len(value):
            raise refuse(allowed)
        for one in value:
            if known is not None and one not in known:
                raise _not_among(one, known)
        return value

    return Annotated[list[str], PlainValidator(check)]


def triple(low: float | None = None, above: float | None = None) -> Any:
    """Three numbers, one a colour channel."""

    def check(value: Any) -> list[float]:
        good = isinstance(value, list) and len(value) == 3
        good = good and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
        if not good or not all(_within(one, low, None, above, None) for one in value):
            raise refuse(f"a list of three numbers {_range(low, None, above, None)}".rstrip())
        return [float(one) for one in value]

    return Annotated[list[float], PlainValidator(check)]


def _device(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise refuse("auto, cpu, cuda or cuda:N")
    return value


def _factors(value: Any) -> dict[str, float]:
    allowed = "a mapping of parameter group to a factor of at least 0, such as {backbone_image: 0.1}"
    if not isinstance(value, dict):
        raise refuse(allowed)
    factors = {}
    for name, factor in value.items():
        if isinstance(factor, str) and _SCIENTIFIC.fullmatch(factor.strip()):
            factor = float(factor)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise refuse(allowed)
        factors[str(name)] = float(factor)
    return factors


Flag = Annotated[bool, PlainValidator(_flag)]
Text = Annotated[str, PlainValidator(_text)]
Probability = real(low=0, below=1)


# --- model ------------------------------------------------------------------------------------------------------------


class EfficientNetLite0Schema(Section):
    name: Text
    image_size: whole(32, multiple=32) = 224
    grid: whole(1) = 4
    freeze: Flag = True


class MiniLMSchema(Section):
    name: Text
    max_words: whole(1, 510) = 64  # BERT's 512 positions less [CLS] and [SEP]
    freeze: Flag = True


class BackboneSchema(Section):
    image: Any = Field(default_factory=lambda: {"name": "efficientnet_lite0"})
    text: Any = Field(default_factory=lambda: {"name": "minilm_l6"})


class ConceptAlignmentSchema(Section):
    depth: whole(0) = 1
    heads: whole(1) = 4
    mlp_ratio: real(above=0) = 2.0
    bag: choice("union", "joint") = "union"
    dropout: Probability = 0.0


class FusionSchema(Section):
    mode: choice("progressive", "mixture") = "progressive"
    gumbel: Flag = False  # noise on the mixture's instruction weights, in training only
    steps: whole(1) = 3
    layers: whole(1) = 1
    module_depth: whole(1) = 1
    heads: whole(1) = 4
    head_dim: whole(1) = 64
    mlp_ratio: real(above=0) = 2.0
    dropout: Probability = 0.0


class MatchingSchema(Section):
    terms: words(("fused", "explicit", "background"), at_least=1) = ["fused", "explicit", "background"]
    temperature: real() = 2.65926
    learn_temperature: Flag = True
    mask_duplicates: Flag = True
    reference_negatives: Flag = True


class LossSchema(Section):
    concept_weight: real(low=0) = 20.0
    focal_alpha: real(low=0, high=1) = 0.5
    focal_gamma: real(low=0) = 1.0


class QueryDropoutSchema(Section):
    image: Probability = 0.05
    text: Probability = 0.05


class ConceptsSchema(Section):
    pos: words(PARTS_OF_SPEECH, at_least=1) = ["NOUN", "VERB", "ADJ", "ADV"]
    min_count: whole(1) = 2


class NeucoreSchema(Section):
    arch: Text
    model_type: Text | None = None
    checkpoint: Text | None = None
    backbone: BackboneSchema = Field(default_factory=BackboneSchema)
    embed_dim: whole(1) = 256
    concept_alignment: ConceptAlignmentSchema = Field(default_factory=ConceptAlignmentSchema)
    fusion: FusionSchema = Field(default_factory=FusionSchema)
    matching: MatchingSchema = Field(default_factory=MatchingSchema)
    loss: LossSchema = Field(default_factory=LossSchema)
    query_dropout: QueryDropoutSchema = Field(default_factory=QueryDropoutSchema)
    concepts: ConceptsSchema = Field(default_factory=ConceptsSchema)


# --- data sets --------------------------------------------------------------------------------------------------------


class ImageProcessorSchema(Section):
    name: Text
    image_size: whole(1) = 224
    mean: triple(low=0) = [0.5, 0.5, 0.5]
    std: triple(above=0) = [0.5, 0.5, 0.5]
    fit: choice("pad", "crop", "stretch") = "pad"
    augment: choice("none", "crop_flip") = "none"


class CaptionProcessorSchema(Section):
    name: Text


class ProcessorPairSchema(Section):
    train: Any = None
    eval: Any = None


class PreprocessSchema(Section):
    vis_processor: ProcessorPairSchema | None = None
    text_processor: ProcessorPairSchema | None = None


class DatasetSchema(Section):
    """Base of the data sets' schemas; a subclass gives `build_info` a type of its own."""

    type: Text = "default"
    data_type: choice("images") = "images"
    build_info: dict[str, Any] = Field(default_factory=dict)
    vis_processor: ProcessorPairSchema | None = None
    text_processor: ProcessorPairSchema | None = None


class EmojiInfoSchema(Section):
    cache_dir: Text | None = None
    image_size: whole(16) = 224
    role_cap: whole(1) = 12
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class EmojiSchema(DatasetSchema):
    build_info: EmojiInfoSchema = Field(default_factory=EmojiInfoSchema)


class CirrInfoSchema(Section):
    root: Text | None = None  # null: the environment variable NEUCORE_CIRR_ROOT
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class CirrSchema(DatasetSchema):
    build_info: CirrInfoSchema = Field(default_factory=CirrInfoSchema)


class FolderInfoSchema(Section):
    root: Text
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class FolderSchema(DatasetSchema):
    build_info: FolderInfoSchema


# --- run --------------------------------------------------------------------------------------------------------------


class RunSchema(Section):
    """The `run` section for our runners."""

    runner: Text = "runner_cir"
    task: Text = "composed_image_retrieval"
    # length: max_epoch for runner_cir, the other two for runner_cir_iter
    max_epoch: whole(1) | None = None
    max_iters: whole(1) | None = None
    iters_per_inner_epoch: whole(1) | None = None
    # learning rate, computed per step
    lr_sched: choice(*LR_SCHEDULERS) = "linear_warmup_cosine_lr"
    init_lr: real(above=0) = 5e-4
    min_lr: real(low=0) = 0.0
    warmup_lr: real(low=-1) = 0.0  # negative means init_lr, as in the host
    warmup_steps: whole(0) = 0
    lr_decay_rate: real(above=0, high=1) = 0.5
    lr_decay_steps: whole(1) | None = None
    lr_scales: Annotated[dict[str, float], PlainValidator(_factors)] = {}
    # optimiser
    weight_decay: real(low=0) = 0.01
    beta2: real(above=0, below=1) = 0.999
    accum_grad_iters: whole(1) = 1
    clip_grad_norm: real(above=0) | None = None
    amp: choice(False, True, "bf16", "fp16") = False
    # data
    batch_size_train: whole(1) = 32
    batch_size_eval: whole(1) = 64
    num_workers: whole(0) = 0
    train_splits: words() = ["train"]
    valid_splits: words() = []
    test_splits: words() = []
    cache_features: Flag = True
    cache_dir: Text | None = None
    score_chunk: whole(1) = 256
    # the run itself
    seed: whole(0, 2**31 - 1) = 42
    output_dir: Text = "output"
    resume: Text = "never"  # never, auto, or the path of a checkpoint
    evaluate: Flag = False
    report: Flag = True
    log_freq: whole(1) = 50
    checkpoint_every_iters: whole(1) | None = None
    # processes
    device: Annotated[str, PlainValidator(_device)] = "auto"
    distributed: Flag = True
    world_size: whole(1) = 1
    dist_url: Text = "env://"
    dist_backend: choice("auto", "gloo", "nccl") = "auto"
    use_dist_eval_sampler: Flag = True


# --- registries -------------------------------------------------------------------------------------------------------

MODEL_SCHEMAS: dict[str, type[BaseModel]] = {"neucore": NeucoreSchema}
DATASET_SCHEMAS: dict[str, type[BaseModel]] = {
    "cirr": CirrSchema,
    "emoji": EmojiSchema,
    "folder": FolderSchema,
}
DATASET_SPLITS: dict[str, tuple[str, ...]] = {"cirr": CIRR_SPLITS, "emoji": EMOJI_SPLITS}
# Laid out as published: the builder itself says what a root folder lacks, file by file.
PUBLISHED_DATASETS = ("cirr",)
PROCESSOR_SCHEMAS: dict[str, type[BaseModel]] = {
    "cir_image": ImageProcessorSchema,
    "cir_caption": CaptionProcessorSchema,
}
BACKBONE_SCHEMAS: dict[str, dict[str, type[BaseModel]]] = {
    "image": {"efficientnet_lite0": EfficientNetLite0Schema},
    "text": {"minilm_l6": MiniLMSchema},
}


def register_dataset_schema(name: str, schema: type[BaseModel], splits: Iterable[str] | None = None) -> None:
    """Check `datasets.<name>` by `schema` (usually a DatasetSchema); `splits`: the names that its builder knows."""
    DATASET_SCHEMAS[name] = schema
    if splits is not None:
        DATASET_SPLITS[name] = tuple(splits)


def register_model_schema(arch: str, schema: type[BaseModel]) -> None:
    """Check the `model` section of `arch` by `schema`."""
    MODEL_SCHEMAS[arch] = schema


def register_backbone_schema(side: str, name: str, schema: type[BaseModel]) -> None:
    """Check `model.backbone.<side>` (image or text) with that name by `schema`."""
    BACKBONE_SCHEMAS[side][name] = schema


def register_processor_schema(name: str, schema: type[BaseModel]) -> None:
    """Check a processor with that name by `schema`."""
    PROCESSOR_SCHEMAS[name] = schema
