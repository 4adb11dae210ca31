"""The released form's encoders: ResNet maps (or maps extracted before) as tokens, GloVe words read by a BiGRU.

Frozen weights are held as buffers here: they belong to the model's state and travel in its checkpoints, so that a
checkpoint needs neither the CNN's nor the word vectors' file, and a later phase may train them under the same names.

B batch, N image tokens, L words, D width.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.files import expanded
from neucore_plugin.common.text import AND as AND_MARK
from neucore_plugin.common.text import released_words
from neucore_plugin.models.backbones.encoder import Encoder, TextEncoder, check_pixels, normalisation
from neucore_plugin.models.backbones.word_vectors import read_word_vectors
from neucore_plugin.weights.checkpoint import fingerprint
from neucore_plugin.weights.files import read_state
from neucore_plugin.weights.pretrained import fit as fit_weights

NETWORKS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}
SPECIALS = ("<pad>", "<start>", AND_MARK, "<end>", "<unk>")
PAD, START, AND, END, UNKNOWN = range(len(SPECIALS))
_WORD = re.compile(rf"{AND_MARK}|[^\W_]+(?:'[^\W_]+)?")


def hold_as_buffers(module: nn.Module) -> None:
    """Turn every parameter below `module` into a buffer of the same name: never trained, always saved."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                del part._parameters[name]
                part.register_buffer(name, value.detach())
        if isinstance(part, nn.RNNBase):
            part.to(value.dtype)  # it keeps a list of its weights, which only this renews


class Features(Encoder):
    """Feature maps extracted before, [width, grid, grid] an image, given in place of pixels."""

    mean, std = normalisation("resnet")

    def __init__(self, width: int, grid: int, image_size: int) -> None:
        super().__init__()
        self.width, self.grid, self.num_tokens = width, (grid, grid), grid * grid
        self.image_size = image_size  # of the pictures that the maps were made from

    @property
    def fingerprint(self) -> str:
        """Of the settings: there are no weights."""
        return f"features:{self.width}:{self.grid[0]}"

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """maps [B,width,grid,grid] -> tokens [B,N,width], pooled [B,width]. ConfigError for other shapes."""
        if tuple(pixels.shape[1:]) != (self.width, *self.grid):
            wanted = ", ".join(map(str, ("B", self.width, *self.grid)))
            raise ConfigError(
                f"the image encoder `features` takes feature maps [{wanted}], given {list(pixels.shape)}; extract them "
                "first, or use model.backbone.image.name=resnet, which takes pictures"
            )
        tokens = pixels.flatten(2).transpose(1, 2)  # [B,N,width]
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class ResNet(Encoder):
    """The last map of a torchvision ResNet as tokens.

    Args:
        network: one of NETWORKS. image_size: side of the square input, a multiple of 32.
        weights: a state dict of torchvision's network, saved by torch; None means random weights (with a warning).
        fit: "released" where pictures are made square as the authors do; None as the processor says.
        moving_norms: the batch norms follow the batches in training though everything is frozen.
        frozen: hold the weights as buffers. load: whether to read `weights`; a checkpoint brings its own.
    """

    mean, std = normalisation("resnet")

    def __init__(
        self,
        network: str,
        weights: str | Path | None,
        image_size: int,
        fit: str | None,
        moving_norms: bool,
        frozen: bool = True,
        load: bool = True,
    ) -> None:
        super().__init__()
        from torchvision import models

        self.fit, self.moving_norms = fit, moving_norms
        side = image_size // 32
        self.width, self.grid, self.num_tokens, self.image_size = NETWORKS[network], (side, side), side**2, image_size
        self.network = getattr(models, network)(weights=None)
        self.network.fc = nn.Identity()
        self.settings = f"resnet:{image_size}"
        if weights is not None and load:
            path = expanded(weights)
            state = {name: value for name, value in read_state(path).items() if not name.startswith("fc.")}
            counters = [name for name in self.network.state_dict() if name.endswith("num_batches_tracked")]
            fit_weights(self.network, state, path, absent=counters, exact=True)  # old files lack the counters
        elif load:
            warnings.warn(
                f"model.backbone.image: {network} has random weights; name a file of torchvision's in its `weights`",
                stacklevel=2,
            )
        if frozen:
            hold_as_buffers(self)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,width], pooled [B,width]."""
        check_pixels(pixels, "resnet", self.image_size)
        return self.encode(pixels)

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """As `forward`, of pictures of any size."""
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        tokens = x.flatten(2).transpose(1, 2)  # [B,N,width]
        return {"tokens": tokens, "pooled": tokens.mean(1)}


def split_words(text: str) -> list[str]:
    """Lower-case words of a caption; punctuation is dropped, `<and>` between two captions is kept."""
    return _WORD.findall(text.lower())


SPLITS = {"default": split_words, "released": released_words}  # how a text becomes words


def word_list(captions: Iterable[str], more: Iterable[str] = (), rule: str = "default") -> list[str]:
    """The specials, then the captions' words in order of first appearance, then `more` (concept lemmas)."""
    words = dict.fromkeys(SPECIALS)
    for caption in captions:
        words.update(dict.fromkeys(SPLITS[rule](caption)))
    words.update(dict.fromkeys(more))
    return list(words)


def released_classes(words: Sequence[str], lemmas: Iterable[str]) -> list[str]:
    """The classes of L_c in the released code: the distinct rows of the training's concepts, in their order; a lemma
    that is no word is `<unk>`, which is a class too."""
    rows = {word: row for row, word in enumerate(words)}
    return [words[row] for row in sorted({rows.get(lemma, UNKNOWN) for lemma in lemmas})]


class GloveBiGRU(TextEncoder):
    """Word embedding and bidirectional GRU over `<start> words <end>`, its sentence the two final states, unit length.

    Args:
        words: the word vocabulary, SPECIALS first; a word outside it is `<unk>`.
        word_dim: width of the embedding. width: of words and sentence, an even number.
        glove: file of word vectors (see word_vectors.py); None means random ones. glove_words: words of a `.npy`.
        max_words: words kept of a text; a longer one is cut.
        captions: one of SPLITS. "released": raw texts, never cut, one without a word is `<start> <end>`; words without
            a vector start as N(0,1); a concept that is no word is `<unk>` as a class too.
        freeze_words: the embedding is not trained. frozen: nothing is. load: whether to read `glove`.
    """

    words_live = True

    def __init__(
        self,
        word_dim: int,
        width: int,
        glove: str | Path | None,
        glove_words: str | Path | None,
        max_words: int,
        captions: str,
        freeze_words: bool,
        words: Sequence[str] = SPECIALS,
        frozen: bool = False,
        load: bool = True,
    ) -> None:
        super().__init__()
        if tuple(words[: len(SPECIALS)]) != SPECIALS or len(set(words)) != len(words):
            raise ValueError(f"a word vocabulary holds each word once and begins with {', '.join(SPECIALS)}")
        self.words, self.word_width, self.width, self.max_words = tuple(words), word_dim, width, max_words
        self.captions = captions
        self._rows = {word: row for row, word in enumerate(self.words)}
        self.embedding = nn.Embedding(len(self.words), word_dim)
        self.gru = nn.GRU(word_dim, width // 2, batch_first=True, bidirectional=True)
        if captions == "default":
            nn.init.xavier_uniform_(self.embedding.weight)
        if glove is not None and load:
            read_word_vectors(glove, glove_words, self._rows, self.embedding.weight.data)
        for part, fixed in ((self.embedding, frozen or freeze_words), (self.gru, frozen)):
            if fixed:
                hold_as_buffers(part)

    @property
    def fingerprint(self) -> str:
        """Of the weights as they are now, and the words."""
        rule = "" if self.captions == "default" else f"{self.captions}:"
        return f"glove_bigru:{rule}{self.max_words}:{fingerprint(self.state_dict(), {'words': ' '.join(self.words)})}"

    def rows(self, text: str) -> list[int]:
        """A caption's words as rows of the embedding, between <start> and <end>."""
        words = [self._rows.get(word, UNKNOWN) for word in SPLITS[self.captions](text)]
        return [START, *(words if self.captions == "released" else words[: self.max_words]), END]

    def known(self, text: str) -> bool:
        """Whether a text holds a word of the vocabulary."""
        return not set(self.rows(text)) <= {START, AND, END, UNKNOWN}

    def class_of(self, concept: str) -> str:
        """The class of L_c that a concept belongs to."""
        return SPECIALS[UNKNOWN] if self.captions == "released" and concept not in self._rows else concept

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; a text without a word is masked, its sentence zero
        (not by the released rule)."""
        if not len(texts):
            return self.no_texts(self.embedding.weight)
        rows = [self.rows(text) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), PAD)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        found = self.encode_ids(ids, lengths)
        if self.captions == "released":
            return found
        spoken = (lengths > 2).to(found["mask"].device)
        return {
            "words": found["words"] * spoken[:, None, None],
            "mask": found["mask"] & spoken[:, None],
            "sentence": found["sentence"] * spoken[:, None],
        }

    def encode_ids(self, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """ids [B,L] with <start> and <end>, lengths [B] -> as `forward`; words are zero at padding."""
        ids = ids.to(self.embedding.weight.device)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        outputs, final = self.gru(packed)
        words, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=ids.shape[1])  # [B,L,D]
        mask = torch.arange(ids.shape[1])[None] < lengths.cpu()[:, None]
        sentence = F.normalize(torch.cat([final[0], final[1]], dim=-1), dim=-1)  # forward, then backward
        return {"words": words, "mask": mask.to(ids.device), "sentence": sentence}

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,word_dim], with gradient where the embedding is trained."""
        rows = [self._rows.get(word, UNKNOWN) for word in words]
        return self.embedding(torch.tensor(rows, dtype=torch.long, device=self.embedding.weight.device))
