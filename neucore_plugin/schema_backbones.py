"""What `model.backbone.image` and `model.backbone.text` may say, a schema an encoder. Knows neither torch nor lavis."""

from pydantic import BaseModel

from neucore_plugin.schema_values import Flag, Probability, Section, Text, choice, real, whole


class LoraSchema(Section):
    """Low-rank adapters (the extra `lora`): the encoder stays frozen, two thin matrices a linear layer are trained."""

    rank: whole(1) = 8
    alpha: real(above=0) = 16.0
    dropout: Probability = 0.0


class EncoderSchema(Section):
    """Base of the schemas of encoders that can be fine-tuned."""

    name: Text
    freeze: Flag = True
    train_blocks: whole(1) | None = None  # with freeze: false, the last blocks alone; null: everything
    layer_decay: real(above=0, high=1) = 1.0  # the learning rate of a block, over that of the block after it
    checkpoint_activations: Flag = False  # computes the blocks' activations again in the backward pass: less memory
    lora: LoraSchema | None = None  # with freeze: false


class EfficientNetLite0Schema(Section):
    name: Text
    image_size: whole(32, multiple=32) = 224
    grid: whole(1) = 4
    freeze: Flag = True
    train_blocks: whole(1) | None = None
    layer_decay: real(above=0, high=1) = 1.0
    checkpoint_activations: Flag = False


class FeaturesSchema(Section):
    name: Text
    width: whole(1) = 2048
    grid: whole(1) = 7
    image_size: whole(32, multiple=32) = 224
    freeze: Flag = True


class ResNetSchema(Section):
    name: Text
    network: choice("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") = "resnet50"
    weights: Text | None = None  # a state dict of torchvision's network; null: random weights
    image_size: whole(32, multiple=32) = 224
    freeze: Flag = True


class GloveBiGRUSchema(Section):
    name: Text
    word_dim: whole(1) = 300
    width: whole(2, multiple=2) = 512
    glove: Text | None = None  # a GloVe text file, or a .npy matrix; null: random vectors
    glove_words: Text | None = None  # words of a .npy, one a line; null: the .txt beside it
    max_words: whole(1) = 128
    freeze_words: Flag = False  # the embedding alone
    freeze: Flag = False


class MiniLMSchema(EncoderSchema):
    max_words: whole(1, 510) = 64  # BERT's 512 positions less [CLS] and [SEP]


BACKBONE_SCHEMAS: dict[str, dict[str, type[BaseModel]]] = {
    "image": {
        "efficientnet_lite0": EfficientNetLite0Schema,
        "resnet": ResNetSchema,
        "features": FeaturesSchema,
    },
    "text": {
        "minilm_l6": MiniLMSchema,
        "glove_bigru": GloveBiGRUSchema,
    },
}
