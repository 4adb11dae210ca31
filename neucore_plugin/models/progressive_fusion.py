"""Progressive fusion: the reference image, changed step by step by what the words say.

Source: Zhao & Xu, "NEUCORE", PMLR 243 (arXiv 2310.01358): each step's block is *instantiated* by a semantic concept
attended from the words, which generates the parameters of its normalisation layers.

Shapes: B batch, N reference tokens, L words, K concepts of a query, D width, E entity width, T layers, S steps (the
released form's instruction types), M = 1 + N + K tokens of an executor. Masks are true where a token is valid.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import FeedForward, SelfAttention, check_positive, check_shape, masked_softmax

MODES = ("progressive", "mixture")


def stacked(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths, in to out, with a ReLU between two."""
    check_positive(linears=len(widths) - 1)
    linears = [nn.Linear(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])


class AttendedEntities(nn.Module):
    """Semantic concepts of the steps, attended from the words one after the other.

    e_0 = 0; g_s = ReLU(Wg [Wq_s m ; e_{s-1}]); alpha = softmax over valid words of v . tanh(Wk g_s + Wf w_l);
    e_s = sum_l alpha_l w_l. sentence m [B,D], words [B,L,D] -> entities [B,S,D], word weights [B,S,L].
    A query without a valid word has zero entities.
    """

    def __init__(self, dim: int, steps: int):
        super().__init__()
        check_positive(dim=dim, steps=steps)
        self.dim = dim
        self.query = nn.ModuleList(nn.Linear(dim, dim) for _ in range(steps))  # Wq_s
        self.guide = nn.Linear(2 * dim, dim)  # Wg
        self.key = nn.Linear(dim, dim)  # Wk
        self.feature = nn.Linear(dim, dim)  # Wf
        self.alpha = nn.Linear(dim, 1)  # v

    def forward(self, sentence: Tensor, words: Tensor, word_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("sentence vectors [B,D]", sentence, None, self.dim)
        check_shape("word vectors [B,L,D]", words, sentence.shape[0], None, self.dim)
        if word_mask is not None:
            check_shape("word mask [B,L]", word_mask, *words.shape[:2])
            words = words.masked_fill(~word_mask.bool()[..., None], 0.0)
        features = self.feature(words)  # [B,L,D]
        entity, entities, weights = torch.zeros_like(sentence), [], []
        for query in self.query:
            guide = torch.relu(self.guide(torch.cat([query(sentence), entity], dim=-1)))  # [B,D]
            logits = self.alpha(torch.tanh(self.key(guide)[:, None] + features)).squeeze(-1)  # [B,L]
            weight = masked_softmax(logits, word_mask)
            entity = torch.einsum("bl,bld->bd", weight, words)
            entities.append(entity)
            weights.append(weight)
        return torch.stack(entities, dim=1), torch.stack(weights, dim=1)


class InstructionWeights(nn.Module):
    """How much each instruction type counts in each layer of the mixture: softmax over types, [B,D] -> [B,T,S].

    The sentence vector gets no gradient from here. With `gumbel`, noise is added in training, never in evaluation.
    """

    def __init__(self, dim: int, layers: int, steps: int, gumbel: bool = False, linears: int = 2):
        super().__init__()
        check_positive(dim=dim, layers=layers, steps=steps)
        self.layers, self.steps, self.gumbel = layers, steps, gumbel
        self.mlp = stacked([dim] * linears + [layers * steps])

    def forward(self, sentence: Tensor) -> Tensor:
        logits = self.mlp(sentence.detach()).view(-1, self.layers, self.steps)
        if self.gumbel and self.training:
            logits = logits - torch.empty_like(logits).exponential_().clamp_min(1e-20).log()
        return logits.softmax(dim=-1)


class AdaptiveInstanceNorm(nn.Module):
    """Instance norm whose scale and shift come from outside: x [B,M,D], scale and shift [B,D] -> [B,M,D].

    Mean and biased variance of each sample and channel are taken over its valid tokens, or over all of them, padding
    included, without `masked_statistics` (the released form); `masked` overrules it in one call.
    """

    def __init__(self, masked_statistics: bool = True, eps: float = 1e-6):
        super().__init__()
        self.masked_statistics, self.eps = masked_statistics, eps

    def forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None = None, masked: bool | None = None
    ) -> Tensor:
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x = x.float()  # sums of squares need the range
        if mask is None or not (self.masked_statistics if masked is None else masked):
            variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        else:
            invalid = ~mask[..., None]
            count = mask.sum(dim=1).clamp_min(1)[:, None, None]
            mean = x.masked_fill(invalid, 0.0).sum(dim=1, keepdim=True) / count
            variance = (x - mean).masked_fill(invalid, 0.0).square().sum(dim=1, keepdim=True) / count
        normal = (x - mean) * torch.rsqrt(variance + self.eps)
        return (normal * scale[:, None] + shift[:, None]).to(dtype)


class Executor(nn.Module):
    """A transformer of `depth` (attention, MLP) pairs whose norms are generated from an entity.

    x [B,M,D], entity [B,E], mask [B,M] -> [B,M,D]; invalid tokens come out as zeros. The generator gives shifts and
    deviations from scale 1, near 0 at the start; in the `released` form it gives the scales themselves, padding enters
    the statistics, and invalid tokens are carried along.
    """

    def __init__(
        self,
        dim: int,
        entity_dim: int,
        depth: int = 1,
        heads: int = 4,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        released: bool = False,
        linears: int = 2,
    ):
        super().__init__()
        check_positive(dim=dim, entity_dim=entity_dim, module_depth=depth, heads=heads, head_dim=head_dim)
        self.dim, self.entity_dim, self.released = dim, entity_dim, released
        self.norm = AdaptiveInstanceNorm(masked_statistics=not released)
        self.attention = nn.ModuleList(
            SelfAttention(dim, heads, head_dim, qkv_bias=False, dropout=dropout, uniform_invalid=released)
            for _ in range(depth)
        )
        self.mlp = nn.ModuleList(FeedForward(dim, int(dim * mlp_ratio), dropout) for _ in range(depth))
        self.generator = stacked([entity_dim] + [4 * dim] * (linears - 1) + [2 * depth * 2 * dim])
        if not released:
            nn.init.normal_(self.generator[-1].weight, std=0.02)
            nn.init.zeros_(self.generator[-1].bias)

    def instantiate(self, entity: Tensor) -> Tensor:
        """[B,E] -> [B, 2 depth, 2, D]: for each norm (attention, MLP, attention, ...) its shift, then its scale."""
        check_shape("entity [B,E]", entity, None, self.entity_dim)
        parameters = self.generator(entity).view(entity.shape[0], -1, 2, self.dim)
        if self.released:
            return parameters
        return parameters + parameters.new_tensor([0.0, 1.0])[:, None]

    def forward(self, x: Tensor, entity: Tensor, mask: Tensor | None = None, alone: bool = False) -> Tensor:
        """`alone`: padding stays out of the statistics in the released form as well."""
        check_shape("executor input [B,M,D]", x, entity.shape[0], None, self.dim)
        if mask is not None:
            check_shape("executor mask [B,M]", mask, *x.shape[:2])
            mask = mask.bool()
            if not self.released:
                x = x.masked_fill(~mask[..., None], 0.0)
        norms = self.instantiate(entity).unbind(dim=1)  # each [B,2,D]
        for index, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            first, second = norms[2 * index], norms[2 * index + 1]
            x = x + attention(self.norm(x, first[:, 1], first[:, 0], mask, alone or None), mask)
            x = x + mlp(self.norm(x, second[:, 1], second[:, 0], mask, alone or None))
        return x if mask is None or self.released else x.masked_fill(~mask[..., None], 0.0)


class ProgressiveFusion(nn.Module):
    """Fuses reference tokens and query concepts under the guidance of the words into one vector per query.

    `progressive`: step k's executor, instantiated by entity e_k, works on the output of step k-1; `layers` such chains
    follow each other. `mixture`: the S executors of a layer work side by side and are summed by instruction weights.
    `released` (mixture only) reproduces the authors' numbers: padding enters the norms, and concepts get no gradient.
    """

    def __init__(
        self,
        dim: int,
        mode: str = "progressive",
        steps: int = 3,
        layers: int = 1,
        module_depth: int = 1,
        heads: int = 4,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        released: bool = False,
        gumbel: bool = False,
        generator_linears: int = 2,
        instruction_linears: int = 2,
    ):
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"fusion.mode is {mode!r}, expected one of: {', '.join(MODES)}")
        if released and mode != "mixture":
            raise ConfigError(f'fusion.mode is {mode!r}, but the released form needs "mixture"')
        check_positive(dim=dim, steps=steps, layers=layers)
        self.dim, self.mode, self.released = dim, mode, released
        self.attend = AttendedEntities(dim, steps)
        self.instructions = None
        if mode == "mixture":
            self.instructions = InstructionWeights(dim, layers, steps, gumbel, instruction_linears)
        self.executors = nn.ModuleList(
            nn.ModuleList(
                Executor(dim, dim, module_depth, heads, head_dim, mlp_ratio, dropout, released, generator_linears)
                for _ in range(steps)
            )
            for _ in range(layers)
        )
        self.output = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self,
        reference_tokens: Tensor,
        reference_fg: Tensor,
        concepts: Tensor,
        concept_mask: Tensor,
        words: Tensor,
        word_mask: Tensor | None,
        sentence: Tensor,
        reference_mask: Tensor | None = None,
        alone: bool = False,
    ) -> dict[str, Tensor]:
        """-> fused [B,D], entities [B,S,D], word_weights [B,S,L]; of a mixture also instruction_weights [B,T,S].

        reference_tokens [B,N,D] (encoded), reference_fg [B,D], concepts [B,K,D] (projected; K may be 0),
        concept_mask [B,K], words [B,L,D], word_mask [B,L], sentence [B,D], reference_mask [B,N].
        A query without a valid reference token is read from the reference_fg slot instead. `alone`: a query's result is
        that of the query by itself, in the released form too, where padding otherwise enters the norms.
        """
        check_shape("reference tokens [B,N,D]", reference_tokens, None, None, self.dim)
        batch, count, _ = reference_tokens.shape
        check_shape("reference foreground [B,D]", reference_fg, batch, self.dim)
        check_shape("concepts [B,K,D]", concepts, batch, None, self.dim)
        check_shape("concept mask [B,K]", concept_mask, batch, concepts.shape[1])
        check_shape("sentence vectors [B,D]", sentence, batch, self.dim)
        if reference_mask is None:
            reference_mask = concept_mask.new_ones(batch, count, dtype=torch.bool)
        check_shape("reference mask [B,N]", reference_mask, batch, count)
        reference_mask, concept_mask = reference_mask.bool(), concept_mask.bool()
        concepts = concepts.masked_fill(~concept_mask[..., None], 0.0)

        entities, word_weights = self.attend(sentence, words, word_mask)  # [B,S,D], [B,S,L]
        x = torch.cat(
            [reference_fg[:, None], reference_tokens, concepts.detach() if self.released else concepts], dim=1
        )
        mask = torch.cat([reference_mask.new_ones(batch, 1), reference_mask, concept_mask], dim=1)  # [B,M]
        result = {"entities": entities, "word_weights": word_weights}
        if self.mode == "progressive":
            x = self._chain(x, entities, mask, alone)
        else:
            result["instruction_weights"] = self.instructions(sentence)  # [B,T,S]
            x = self._mixture(x, entities, mask, result["instruction_weights"], alone)
        return {"fused": self.output(self._mean(x[:, : count + 1], reference_mask)), **result}

    def _chain(self, x: Tensor, entities: Tensor, mask: Tensor, alone: bool) -> Tensor:
        for layer in self.executors:
            for executor, entity in zip(layer, entities.unbind(dim=1), strict=True):
                x = executor(x, entity, mask, alone)
        return x

    def _mixture(self, x: Tensor, entities: Tensor, mask: Tensor, weights: Tensor, alone: bool) -> Tensor:
        for layer, weight in zip(self.executors, weights.unbind(dim=1), strict=True):  # weight [B,S]
            outputs = [
                executor(x, entity, mask, alone) for executor, entity in zip(layer, entities.unbind(dim=1), strict=True)
            ]
            x = torch.einsum("bs,sbmd->bmd", weight, torch.stack(outputs))
        return x

    @staticmethod
    def _mean(x: Tensor, reference_mask: Tensor) -> Tensor:
        """Mean over the valid reference tokens of x [B,1+N,D], whose slot 0 stands in where there is none."""
        valid = torch.cat([~reference_mask.any(dim=1, keepdim=True), reference_mask], dim=1)  # [B,1+N]
        total = x.masked_fill(~valid[..., None], 0.0).sum(dim=1)
        return total / valid.sum(dim=1, keepdim=True)
