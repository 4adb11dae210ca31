"""What the `model` section may say; the encoders' own sections are in `encoders.py`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from neucore_plugin.config.encoders import EfficientNetLite0Schema, ImageEncoder, MiniLMSchema, TextEncoder
from neucore_plugin.config.kinds import Allowed, NoneTwice, Probability, Real, Text
from neucore_plugin.config.section import Section

# Universal tags, as spaCy gives them, but for those that never hold a word: PUNCT, SYM, X, SPACE.
PARTS_OF_SPEECH = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "SCONJ")
PARTS_OF_SPEECH += ("VERB",)
WITH_DROPOUT = ("combiner", "cross_attention")  # methods of cir_baseline
ZERO_SHOT = ("average", "inversion", "joint")  # those that train nothing: a pretrained model's own vectors
PLACEHOLDER = "$"  # where the prompt of inversion has the reference's word
_METHODS = ("image_only", "text_only", "sum", "tirg", "artemis", "combiner", "cross_attention", *ZERO_SHOT)


class BackboneSchema(Section):
    image: ImageEncoder = Field(
        default_factory=lambda: EfficientNetLite0Schema(name="efficientnet_lite0"),
        title="image encoder",
        description="the image encoder, by its `name`",
    )
    text: TextEncoder = Field(
        default_factory=lambda: MiniLMSchema(name="minilm_l6"),
        title="text encoder",
        description="the text encoder, by its `name`",
    )


class ConceptAlignmentSchema(Section):
    depth: int = Field(1, ge=0, description="transformer blocks over the bag of image tokens")
    heads: int = Field(4, ge=1, description="attention heads of a block; they divide `embed_dim`")
    mlp_ratio: Real = Field(2.0, gt=0, description="width of a block's MLP over its tokens'")
    bag: Literal["union", "joint"] = Field(
        "union",
        description="what the blocks see: reference and target each by itself, or (joint, the released form) both at "
        "once behind a class token",
    )
    dropout: Probability = Field(0.0, description="dropout in the blocks")


class FusionSchema(Section):
    mode: Literal["progressive", "mixture"] = Field(
        "progressive",
        description="the paper's chain of steps; mixture: the released code's form, which weighs all steps' outputs",
    )
    gumbel: bool = Field(False, description="noise on the mixture's instruction weights, in training only")
    steps: int = Field(
        3,
        ge=1,
        description="semantic concepts attended from the words, one a step; of a mixture its kinds of instruction",
    )
    clauses: int = Field(
        4, ge=1, description="of the form in clauses: how many a caption has at most, each a step; 1: always one step"
    )
    places: bool = Field(True, description="of the form in clauses: each clause attends the reference's tokens")
    layers: int = Field(1, ge=1, description="chains of all steps, one after the other")
    module_depth: int = Field(1, ge=1, description="pairs of attention and MLP in a step")
    heads: int = Field(4, ge=1, description="attention heads of a block")
    head_dim: int = Field(64, ge=1, description="width of a head")
    mlp_ratio: Real = Field(2.0, gt=0, description="width of a block's MLP over its tokens'")
    dropout: Probability = Field(0.0, description="dropout in the blocks")
    attend_padding: bool = Field(
        False,
        description="queries attend the padding of their batch, as in the authors' evaluation in batches of 32: "
        "results then depend on batch-mates; false: each query as if alone",
    )
    generator_linears: int = Field(2, ge=1, description="linear layers that generate a block's norms from the words")
    instruction_linears: int = Field(2, ge=1, description="linear layers that give the mixture's instruction weights")


class ContrastiveMatchingSchema(Section):
    """What the matching of every model takes."""

    temperature: Real = Field(
        2.65926, description="natural logarithm of the factor on scores in the loss, at the start"
    )
    learn_temperature: bool = Field(True, description="whether `temperature` is trained")
    mask_duplicates: bool = Field(True, description="batch-mates that answer a query as well are no negatives of it")
    reference_negatives: bool = Field(
        True, description="the batch's reference images are negatives, beside its targets"
    )
    negatives: Annotated[
        Literal["batch", "gallery"] | Annotated[int, Field(ge=1)],
        Allowed("batch, gallery, or a whole number of at least 1"),
    ] = Field(
        "batch",
        description="further negatives of every query: none, all images of the training splits, or so many of them, "
        "drawn anew each step, or each epoch where their encodings are kept",
    )


class MatchingSchema(ContrastiveMatchingSchema):
    terms: Annotated[list[Literal["fused", "explicit", "background", "implicit", "change"]], NoneTwice] = Field(
        ["fused", "explicit", "background"],
        min_length=1,
        description="what the score is the sum of; the form in clauses has implicit and change in place of background",
    )


class LossSchema(Section):
    concept_weight: Real = Field(20.0, ge=0, description="weight of the concept loss beside the matching loss")
    focal_alpha: Real = Field(0.5, ge=0, le=1, description="weight of a concept that is there, against one that is not")
    focal_gamma: Real = Field(1.0, ge=0, description="how much concepts that are told with certainty count less")


class QueryDropoutSchema(Section):
    image: Probability = Field(0.05, description="share of training queries that lose their reference image")
    text: Probability = Field(0.05, description="share of training queries that lose their relative caption")
    mode: Literal["replace", "extra"] = Field(
        "replace",
        description="these queries themselves, or (extra) a second copy of them with a loss of its own, `loss_partial`",
    )
    weight: Real = Field(0.1, ge=0, description="of extra: weight of such a copy beside a whole query")


class ConceptsSchema(Section):
    pos: Annotated[list[Literal[PARTS_OF_SPEECH]], NoneTwice] = Field(
        ["NOUN", "VERB", "ADJ", "ADV"], min_length=1, description="parts of speech whose lemmas are concepts"
    )
    min_count: int = Field(2, ge=1, description="captions of the training that must hold a concept")


class LayoutSchema(Section):
    components: int = Field(
        0,
        ge=0,
        description="principal components of each place of an image, at most as many as its tokens are wide; 0, and "
        "where tokens have no place: none",
    )
    dropout: Real = Field(0.0, ge=0, lt=1, description="share of them that an image loses in training")


class CrossAttentionSchema(Section):
    depth: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads of a block; they divide `embed_dim`")
    mlp_ratio: Real = Field(2.0, gt=0, description="width of a block's MLP over its tokens'")


class InversionSchema(Section):
    weights: Text | None = Field(None, description="path of phi: pic2word's, SEARLE's or LinCIR's; needed by inversion")
    prompt: Text = Field(
        f"a photo of {PLACEHOLDER} that {{}}",
        description=f"what the text tower reads: {PLACEHOLDER} is the reference's word, {{}} the relative caption",
    )
    normalised: bool = Field(False, description="phi takes the reference's vector at unit length")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        head, *rest = self.prompt.split("{}")
        if len(rest) != 1 or self.prompt.count(PLACEHOLDER) != 1 or PLACEHOLDER not in head:
            yield "prompt", f"got {self.prompt!r}; allowed: a text with one {PLACEHOLDER}, and after it one {{}}"


class ModelSchema(Section):
    """What every model here takes."""

    arch: Text = Field(description="which model: neucore, or cir_baseline")
    model_type: Text | None = Field(None, description="set of defaults: a file of configs/models; null: embedded")
    checkpoint: Text | None = Field(None, description="a trained checkpoint to start from or to evaluate")
    backbone: BackboneSchema = Field(default_factory=BackboneSchema, description="the two encoders")
    embed_dim: int = Field(
        256, ge=1, description="width of everything behind the encoders' projections; zero-shot methods have none"
    )
    query_dropout: QueryDropoutSchema = Field(
        default_factory=QueryDropoutSchema, description="learned stand-ins in place of a part of the query, in training"
    )
    feature_dropout: Real = Field(
        0.0, ge=0, lt=1, description="share of the image encoder's channels that an image loses in training"
    )
    layout: LayoutSchema = Field(
        default_factory=LayoutSchema,
        description="of models that read an image's pooled vector: what is where in it, beside that",
    )
    concepts: ConceptsSchema = Field(
        default_factory=ConceptsSchema, description="the concept vocabulary of the training captions"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.query_dropout.image + self.query_dropout.text > 1:
            given = self.query_dropout.model_dump()
            yield "query_dropout", f"got {given}; allowed: image and text together at most 1"

    def heads_conflict(self, key: str, heads: int) -> Iterator[tuple[str, str]]:
        """The conflict of heads that do not divide the width."""
        if self.embed_dim % heads:
            yield key, f"got {heads}; allowed: a divisor of model.embed_dim ({self.embed_dim})"


class CirBaselineSchema(ModelSchema):
    """The baselines, on the same backbones and with the same loss; the keys that NEUCORE has too mean the same."""

    # As published, a baseline reads the pooled vector alone, unless it is asked for more.
    unshared: ClassVar[frozenset[str]] = frozenset({"layout"})

    arch: Literal["cir_baseline"] = Field(description="cir_baseline")
    method: Literal[_METHODS] = Field(
        "combiner",
        description=f"how reference image and relative caption are composed; {', '.join(ZERO_SHOT)} train nothing",
    )
    dropout: Probability | None = Field(
        None, description="of combiner (null: 0.5, as published) and cross_attention (null: 0)"
    )
    cross_attention: CrossAttentionSchema = Field(
        default_factory=CrossAttentionSchema, description="of the method of that name"
    )
    text_weight: Real = Field(0.5, ge=0, le=1, description="of average: the caption's share beside the reference's")
    inversion: InversionSchema = Field(default_factory=InversionSchema, description="of the method of that name")
    matching: ContrastiveMatchingSchema = Field(
        default_factory=ContrastiveMatchingSchema, description="scores and their loss"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.dropout is not None and self.method not in WITH_DROPOUT:
            yield "dropout", f"got {self.dropout}; {self.method} has none, only {' and '.join(WITH_DROPOUT)}"
        if self.method == "cross_attention":
            yield from self.heads_conflict("cross_attention.heads", self.cross_attention.heads)
        if self.method == "inversion" and self.inversion.weights is None:
            yield (
                "inversion.weights",
                "got null; allowed: the path of the weights of phi, without which nothing is done",
            )
        for side in ("image", "text") if self.method in ZERO_SHOT else ():
            if not getattr(self.backbone, side).freeze:
                yield f"backbone.{side}.freeze", f"got false; {self.method} trains nothing"
        if self.method in ZERO_SHOT and self.layout.components:
            yield "layout.components", f"got {self.layout.components}; {self.method} trains nothing, allowed: 0"
        if self.method == "image_only" and self.backbone.text.freeze is False:
            yield "backbone.text.freeze", "got false; image_only reads no text, so that nothing would train it"


class NeucoreSchema(ModelSchema):
    """NEUCORE (Zhao & Xu, 2023)."""

    arch: Literal["neucore"] = Field(description="neucore")
    form: Literal["default", "clauses", "released"] = Field(
        "default",
        description="default: the paper's, read closely; clauses: a pooled vector, changed by one clause of the "
        "caption after the other, with a gallery cheap enough for all images as negatives; released: as in the "
        "authors' code, with their checkpoints' weights",
    )
    concept_alignment: ConceptAlignmentSchema = Field(
        default_factory=ConceptAlignmentSchema, description="concepts found in reference and target image"
    )
    fusion: FusionSchema = Field(default_factory=FusionSchema, description="the reference image, changed step by step")
    matching: MatchingSchema = Field(
        default_factory=MatchingSchema, description="scores of query and gallery, and their loss"
    )
    loss: LossSchema = Field(default_factory=LossSchema, description="the concept loss, a focal loss")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        yield from self.heads_conflict("concept_alignment.heads", self.concept_alignment.heads)
        allowed = ["fused", "explicit", *(["implicit", "change"] if self.form == "clauses" else ["background"])]
        hints = {"clauses": "has the former form", "default": "sets what this form needs"}
        other = f"; the type embedded_paper {hints[self.form]}" if self.form in hints else ""
        if unknown := [term for term in self.matching.terms if term not in allowed]:
            yield "matching.terms", f"got {unknown}; model.form {self.form} has {', '.join(allowed)}{other}"
        elif self.matching.terms == ["change"]:
            yield "matching.terms", "got change alone; allowed: beside another term"
        elif (given := self.layout.components) and self.form != "clauses":
            yield "layout.components", f"got {given}; model.form {self.form} reads an image's tokens, allowed: 0{other}"
        own, usual = {"clauses", "places"}, FusionSchema()
        for key in FusionSchema.model_fields:
            if (key in own) != (self.form == "clauses") and getattr(self.fusion, key) != getattr(usual, key):
                given = getattr(self.fusion, key)
                yield f"fusion.{key}", f"got {given}; model.form {self.form} does not read it{other}"
        if self.form == "released":
            for key, given, needed in (
                ("concept_alignment.bag", self.concept_alignment.bag, "joint"),
                ("fusion.mode", self.fusion.mode, "mixture"),
            ):
                if given != needed:
                    yield key, f"got {given!r}; model.form released needs {needed!r}"
            width = getattr(self.backbone.text, "width", self.embed_dim)
            if width != self.embed_dim:
                yield "backbone.text.width", f"got {width}; model.form released needs model.embed_dim's"
