"""The losses of a whole training batch, over all processes and with negatives beyond it. Knows no host.

B queries of this process's batch, E of them once more without image or text, G images of all batches, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.inputs import partial_rows
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.matching_loss import MatchingLoss, partial_loss, right_columns
from neucore_plugin.models.negatives import Negatives, log_sums

Rows = dict[str, Tensor]


class BatchLoss:
    """From the encodings of a batch's pairs to its losses.

    Args:
        rules: the matching loss. query_dropout: as in CirModel. wanted: its `negatives`.
        exchange: rows of this process -> those of all processes, this one's first, with gradient.

    Attributes: negatives, the images beyond the batch, None until a training gallery is given; partial_weight, that of
    a query without image or text beside a whole one, None where these stand in place of whole ones.
    """

    def __init__(
        self,
        rules: MatchingLoss,
        query_dropout: Mapping[str, Any],
        wanted: str | int,
        exchange: Callable[[Rows], Rows],
    ) -> None:
        self.rules, self.wanted, self._exchange = rules, wanted, exchange
        self._query_dropout = query_dropout
        self.partial_weight = query_dropout["weight"] if query_dropout["mode"] == "extra" else None
        self.negatives: Negatives | None = None

    def __call__(
        self,
        encoded: Mapping[str, Tensor],
        samples: Mapping[str, Any],
        matching: Matching,
        training: bool,
        shared_noise: Tensor,
    ) -> Rows:
        """{"query.*", "target.*", "reference.*", "loss_*"} of B rows each, "partial.*" of E rows -> losses, scalars.

        Each query is compared with the targets of all processes; rows of "loss_*" are averaged; `loss` is the sum of
        all. With several processes the gallery of the loss is that of the whole global batch, gathered with its
        gradient, so that N processes of B pairs equal one of N x B. In training further negatives follow, with the
        dropout of `shared_noise` [1], as all gallery images of the step have it.
        """
        sides = ["target", "reference"] if self.rules.reference_negatives else ["target"]
        query, partial, target = (
            {name.partition(".")[2]: value for name, value in encoded.items() if name.startswith(f"{side}.")}
            for side in ("query", "partial", "target")
        )
        shown = {name: torch.stack([encoded[f"{side}.{name}"] for side in sides], dim=1) for name in target}
        device, count = matching.temperature.device, len(samples["target_key"])
        told = {"key": torch.stack([samples[f"{side}_key"].to(device) for side in sides], dim=1)}  # [B,sides]
        if "noise" in samples:
            told["noise"] = samples["noise"].to(device)[:, None].expand(-1, len(sides))
        gallery, told = columns(self._exchange(shown)), columns(self._exchange(told))  # [G,D], [G]
        keys, right, factor = told["key"], samples.get("right_keys"), matching.factor()
        partial_right = self._partial_right(samples) if partial else []
        further: tuple[Tensor | None, ...] = (None, None, None)
        if training and self.wanted != "batch":
            negatives = self._begun(samples, count)
            asked = (query, right if self.rules.mask_duplicates else [()] * count), (partial, partial_right)
            further = log_sums(matching.score, factor, negatives.blocks(keys, shared_noise), *asked)
            negatives.keep(keys, gallery, told.get("noise"))
        if len(keys) < 2 and (further[0] is None or not further[0].shape[1]):
            raise ConfigError(
                "a batch of one pair has no negatives: its matching loss is always 0. Set run.batch_size_train to 2 or "
                "more, or model.matching.reference_negatives: true, or start several processes"
            )
        found = {"loss_matching": self.rules(matching.score(query, gallery), factor, keys, right, further[0])}
        if partial:
            # Neither gallery nor temperature learns from queries that have many answers.
            scores = matching.score(partial, {name: value.detach() for name, value in gallery.items()})  # [E,G]
            losses = partial_loss(scores, factor.detach(), right_columns(keys, partial_right), *further[1:])
            found["loss_partial"] = self.partial_weight * losses.sum() / count  # so that chunks and processes add up
        found |= {name: rows.mean() for name, rows in encoded.items() if name.startswith("loss_")}
        return {"loss": sum(found.values()), **found}

    def _partial_right(self, samples: Mapping[str, Any]) -> list[Sequence[int]]:
        """Keys of what answers each of the E queries."""
        rows, no_image = (part.tolist() for part in partial_rows(self._query_dropout, samples["noise"]))
        keys = {True: samples["text_keys"], False: samples["reference_keys"]}
        return [keys[lost][row] for row, lost in zip(rows, no_image, strict=True)]

    def _begun(self, samples: Mapping[str, Any], count: int) -> Negatives:
        """The negatives at the place of the training that the runner notes in the batch."""
        if self.negatives is None:
            raise ConfigError(
                f"model.matching.negatives is {self.wanted}, but the model knows no training images. The task "
                "composed_image_retrieval names them; in a loop of your own call use_gallery(), or set it to batch"
            )
        iteration = iteration_of(samples)
        self.negatives.begin(int(samples.get("epoch", 0)), iteration)
        self.negatives.refresh(iteration, count, self._exchange)
        return self.negatives


def iteration_of(samples: Mapping[str, Any]) -> int:
    """The number of a batch in its training, as the runner notes it; 0 where none does."""
    epoch, length, number = (int(samples.get(name, 0)) for name in ("epoch", "num_iters_per_epoch", "iters"))
    return epoch * length + number


def columns(rows: Mapping[str, Tensor]) -> Rows:
    """[B,sides,...] -> [sides B,...], one side after the other: the columns of a batch's scores."""
    return {name: value.transpose(0, 1).flatten(0, 1) for name, value in rows.items()}


def by_side(**sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `BatchLoss` takes: the entries of each side as "side.name"."""
    return {f"{side}.{name}": value for side, entries in sides.items() for name, value in entries.items()}
