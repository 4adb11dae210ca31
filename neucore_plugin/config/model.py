"""What the `model` section may say; the encoders' own sections are in `schema_backbones.py`."""

from typing import Any

from pydantic import Field

from neucore_plugin.config.values import Flag, Probability, Section, Text, choice, real, whole, words

METHODS = ("image_only", "text_only", "sum", "tirg", "artemis", "combiner", "cross_attention")  # of cir_baseline
WITH_DROPOUT = ("combiner", "cross_attention")  # of these
PARTS_OF_SPEECH = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN")
PARTS_OF_SPEECH += ("PUNCT", "SCONJ", "SYM", "VERB", "X")  # the universal tags, as spaCy gives them


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
    generator_linears: whole(1) = 2  # linear layers that generate a block's norms
    instruction_linears: whole(1) = 2  # and of the mixture's instruction weights


class ContrastiveSchema(Section):
    """What the matching of every model takes."""

    temperature: real() = 2.65926
    learn_temperature: Flag = True
    mask_duplicates: Flag = True
    reference_negatives: Flag = True


class MatchingSchema(ContrastiveSchema):
    terms: words(("fused", "explicit", "background"), at_least=1) = ["fused", "explicit", "background"]


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


class CrossAttentionSchema(Section):
    depth: whole(1) = 2
    heads: whole(1) = 4
    mlp_ratio: real(above=0) = 2.0


class CirBaselineSchema(Section):
    """The baselines, on the same backbones and with the same loss; the keys that NEUCORE has too mean the same."""

    arch: Text
    model_type: Text | None = None
    checkpoint: Text | None = None
    method: choice(*METHODS) = "combiner"
    backbone: BackboneSchema = Field(default_factory=BackboneSchema)
    embed_dim: whole(1) = 256
    dropout: Probability | None = None  # of combiner (null: 0.5, as published) and cross_attention (null: 0)
    cross_attention: CrossAttentionSchema = Field(default_factory=CrossAttentionSchema)
    matching: ContrastiveSchema = Field(default_factory=ContrastiveSchema)
    query_dropout: QueryDropoutSchema = Field(default_factory=QueryDropoutSchema)
    concepts: ConceptsSchema = Field(default_factory=ConceptsSchema)


class NeucoreSchema(Section):
    arch: Text
    model_type: Text | None = None
    checkpoint: Text | None = None
    form: choice("default", "released") = "default"
    backbone: BackboneSchema = Field(default_factory=BackboneSchema)
    embed_dim: whole(1) = 256
    concept_alignment: ConceptAlignmentSchema = Field(default_factory=ConceptAlignmentSchema)
    fusion: FusionSchema = Field(default_factory=FusionSchema)
    matching: MatchingSchema = Field(default_factory=MatchingSchema)
    loss: LossSchema = Field(default_factory=LossSchema)
    query_dropout: QueryDropoutSchema = Field(default_factory=QueryDropoutSchema)
    concepts: ConceptsSchema = Field(default_factory=ConceptsSchema)
