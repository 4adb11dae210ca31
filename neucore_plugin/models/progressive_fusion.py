"""Progressive fusion: the reference image, changed step by step by what the words say.

Source: Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358),
progressive fusion. The equations and their tests: docs/equations.md.

B batch, N reference tokens, L words, K concepts of a query, D width, E entity width, T layers, S steps (the released
form's instruction types), M = 1 + N + K tokens of an executor. Masks are true where a token is valid.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
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

    e_0 = 0;  g_s = ReLU(Wg [Wq_s m ; e_{s-1}]);  a = softmax_l( v . tanh(Wk g_s + Wf w_l) );  e_s = sum_l a_l w_l,
    the softmax over valid words. A query without one has zero entities.
    """

    def __init__(self, *, dim: int, steps: int):
        super().__init__()
        check_positive(dim=dim, steps=steps)
        self.dim = dim
        self.query = nn.ModuleList(nn.Linear(dim, dim) for _ in range(steps))  # Wq_s
        self.guide = nn.Linear(2 * dim, dim)  # Wg
        self.key = nn.Linear(dim, dim)  # Wk
        self.feature = nn.Linear(dim, dim)  # Wf
        self.alpha = nn.Linear(dim, 1)  # v

    def forward(self, sentence: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """m [B,D], w [B,L,D], mask [B,L] -> entities [B,S,D], word weights a [B,S,L]."""
        check_shape("sentence vectors [B,D]", sentence, None, self.dim)
        check_shape("word vectors [B,L,D]", words, sentence.shape[0], None, self.dim)
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
    """How much each instruction type counts in each layer of the mixture: softmax_s(MLP(m)), [B,D] -> [B,T,S].

    The MLP has `linears` layers before the last. The sentence vector gets no gradient from here. With `gumbel`, Gumbel
    noise is added to the logits in training, never in evaluation.
    """

    def __init__(self, *, dim: int, layers: int, steps: int, gumbel: bool, linears: int):
        super().__init__()
        check_positive(dim=dim, layers=layers, steps=steps)
        self.layers, self.steps, self.gumbel = layers, steps, gumbel
        self.mlp = stacked([dim] * linears + [layers * steps])

    def forward(self, sentence: Tensor) -> Tensor:
        logits = self.mlp(sentence.detach()).view(-1, self.layers, self.steps)  # [B,T,S]
        if self.gumbel and self.training:
            logits = logits - torch.empty_like(logits).exponential_().clamp_min(1e-20).log()
        return logits.softmax(dim=-1)


class AdaptiveInstanceNorm(nn.Module):
    """Instance norm whose scale and shift come from outside: scale (x - mean) / sqrt(variance + eps) + shift.

    Mean and biased variance of each sample and channel are taken over its valid tokens, or over all without a mask.
    """

    EPS = 1e-6

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,M,D], scale and shift [B,D], mask [B,M] -> [B,M,D]."""
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x = x.float()  # sums of squares need the range
        if mask is None:
            variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)  # each [B,1,D]
        else:
            invalid = ~mask[..., None]
            count = mask.sum(dim=1).clamp_min(1)[:, None, None]
            mean = x.masked_fill(invalid, 0.0).sum(dim=1, keepdim=True) / count
            variance = (x - mean).masked_fill(invalid, 0.0).square().sum(dim=1, keepdim=True) / count
        normal = (x - mean) * torch.rsqrt(variance + self.EPS)
        return (normal * scale[:, None] + shift[:, None]).to(dtype)


class Executor(nn.Module):
    """A meta-fusion block: a transformer of `depth` (attention, MLP) pairs whose norms an entity generates.

    x <- x + Attention(AdaIN(x; e)),  x <- x + MLP(AdaIN(x; e)), a scale and a shift for each of the 2 depth norms.
    The generator, an MLP of `linears` layers, gives shifts and deviations from scale 1, near 0 at the start; invalid
    tokens come out as zeros. In the `released` form it gives the scales themselves, padding enters the statistics, and
    invalid tokens are carried along.
    """

    def __init__(
        self,
        *,
        dim: int,
        entity_dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float,
        dropout: float,
        released: bool,
        linears: int,
    ):
        super().__init__()
        check_positive(dim=dim, entity_dim=entity_dim, module_depth=depth)
        self.dim, self.entity_dim, self.released = dim, entity_dim, released
        self.norm = AdaptiveInstanceNorm()
        attention = {"dim": dim, "heads": heads, "head_dim": head_dim, "dropout": dropout}
        self.attention = nn.ModuleList(
            SelfAttention(**attention, qkv_bias=False, uniform_invalid=released) for _ in range(depth)
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

    def forward(self, x: Tensor, entity: Tensor, mask: Tensor, alone: bool = False) -> Tensor:
        """x [B,M,D], entity [B,E], mask [B,M] -> [B,M,D]. `alone`: as in ProgressiveFusion."""
        check_shape("executor input [B,M,D]", x, entity.shape[0], None, self.dim)
        check_shape("executor mask [B,M]", mask, *x.shape[:2])
        mask = mask.bool()
        if not self.released:
            x = x.masked_fill(~mask[..., None], 0.0)
        counted = None if self.released and not alone else mask  # what enters the norms' statistics
        norms = self.instantiate(entity).unbind(dim=1)  # each [B,2,D]
        for attention, mlp, first, second in zip(self.attention, self.mlp, norms[::2], norms[1::2], strict=True):
            x = x + attention(self.norm(x, first[:, 1], first[:, 0], counted), mask)
            x = x + mlp(self.norm(x, second[:, 1], second[:, 0], counted))
        return x if self.released else x.masked_fill(~mask[..., None], 0.0)


class ProgressiveFusion(nn.Module):
    """Fuses reference tokens and query concepts under the guidance of the words into one vector per query:

    x_0 = [r_fg ; E(f^r) ; w_c],  x_s = Executor_s(x_{s-1}; e_s),  f = MLP(mean of the N reference tokens of x_S),

    with the entities e_s of `AttendedEntities`. `layers` such chains follow each other. The slot of r_fg and the
    concepts are left out of the mean.

    Args:
        dim: D. steps: S. layers: T. module_depth, heads, head_dim, mlp_ratio, dropout: of an executor.
        mode: "progressive", the chain above, or "mixture": the S executors of a layer work side by side, and
            x <- sum_s weight_s Executor_s(x; e_s), with the weights of `InstructionWeights`.
        released: the authors' numbers ("mixture" alone): padding enters the norms, and concepts get no gradient.
        gumbel, instruction_linears: of InstructionWeights. generator_linears: linear layers that generate the norms.
        attend_padding: in evaluation, padding words are attended as zeros, as in the released code's batches.

    >>> fusion = ProgressiveFusion(
    ...     dim=8, mode="progressive", steps=3, layers=1, module_depth=1, heads=2, head_dim=4, mlp_ratio=2.0,
    ...     dropout=0.0, released=False, gumbel=False, generator_linears=2, instruction_linears=2, attend_padding=False)
    >>> concepts, concept_mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    >>> words, word_mask = torch.randn(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    >>> tokens, foreground, sentence = torch.randn(2, 16, 8), torch.randn(2, 8), torch.randn(2, 8)
    >>> fused = fusion(tokens, foreground, concepts, concept_mask, words, word_mask, sentence)
    >>> fused["fused"].shape, fused["entities"].shape, fused["word_weights"].shape
    (torch.Size([2, 8]), torch.Size([2, 3, 8]), torch.Size([2, 3, 7]))

    Source: Zhao & Xu 2023, progressive fusion; attended entities and "mixture" in detail: the released code.
    """

    def __init__(
        self,
        *,
        dim: int,
        mode: str,
        steps: int,
        layers: int,
        module_depth: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float,
        dropout: float,
        released: bool,
        gumbel: bool,
        generator_linears: int,
        instruction_linears: int,
        attend_padding: bool,
    ):
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"fusion.mode is {mode!r}, expected one of: {', '.join(MODES)}")
        if released and mode != "mixture":
            raise ConfigError(f'fusion.mode is {mode!r}, but the released form needs "mixture"')
        check_positive(dim=dim, steps=steps, layers=layers)
        self.dim, self.mode, self.released, self.attend_padding = dim, mode, released, attend_padding
        self.attend = AttendedEntities(dim=dim, steps=steps)
        self.instructions = None
        if mode == "mixture":
            self.instructions = InstructionWeights(
                dim=dim, layers=layers, steps=steps, gumbel=gumbel, linears=instruction_linears
            )
        executor = {"dim": dim, "entity_dim": dim, "depth": module_depth, "heads": heads, "head_dim": head_dim}
        executor |= {"mlp_ratio": mlp_ratio, "dropout": dropout, "released": released, "linears": generator_linears}
        self.executors = nn.ModuleList(nn.ModuleList(Executor(**executor) for _ in range(steps)) for _ in range(layers))
        self.output = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(
        self,
        reference_tokens: Tensor,
        reference_fg: Tensor,
        concepts: Tensor,
        concept_mask: Tensor,
        words: Tensor,
        word_mask: Tensor,
        sentence: Tensor,
        alone: bool = False,
    ) -> dict[str, Tensor]:
        """-> fused [B,D], entities [B,S,D], word_weights [B,S,L]; of a mixture also instruction_weights [B,T,S].

        reference_tokens [B,N,D] (encoded), reference_fg [B,D], concepts [B,K,D] (projected; K may be 0),
        concept_mask [B,K], words [B,L,D], word_mask [B,L], sentence [B,D]. `alone`: a query's result is that of the
        query by itself, in the released form too, where padding otherwise enters the norms; but for `attend_padding`.
        """
        check_shape("reference tokens [B,N,D]", reference_tokens, None, None, self.dim)
        batch, count, _ = reference_tokens.shape
        check_shape("reference foreground [B,D]", reference_fg, batch, self.dim)
        check_shape("concepts [B,K,D]", concepts, batch, None, self.dim)
        check_shape("concept mask [B,K]", concept_mask, batch, concepts.shape[1])
        check_shape("sentence vectors [B,D]", sentence, batch, self.dim)
        concepts = concepts.masked_fill(~concept_mask.bool()[..., None], 0.0)
        if self.released:
            concepts = concepts.detach()

        if alone and self.attend_padding:
            words, word_mask = words * word_mask[..., None], torch.ones_like(word_mask)
        entities, word_weights = self.attend(sentence, words, word_mask)  # [B,S,D], [B,S,L]
        x = torch.cat([reference_fg[:, None], reference_tokens, concepts], dim=1)  # [B,M,D]
        mask = F.pad(concept_mask.bool(), (1 + count, 0), value=True)  # [B,M]
        result = {"entities": entities, "word_weights": word_weights}
        if self.mode == "progressive":
            for layer in self.executors:
                for executor, entity in zip(layer, entities.unbind(dim=1), strict=True):
                    x = executor(x, entity, mask, alone)
        else:
            result["instruction_weights"] = self.instructions(sentence)  # [B,T,S]
            for layer, weight in zip(self.executors, result["instruction_weights"].unbind(dim=1), strict=True):
                pairs = zip(layer, entities.unbind(dim=1), strict=True)
                outputs = torch.stack([executor(x, entity, mask, alone) for executor, entity in pairs])  # [S,B,M,D]
                x = torch.einsum("bs,sbmd->bmd", weight, outputs)
        # A zero in the foreground's slot, not a cut, keeps the order of addition, and with it every bit of old results.
        tokens = F.pad(x[:, 1 : 1 + count], (0, 0, 1, 0))  # [B,1+N,D]
        return {"fused": self.output(tokens.sum(dim=1) / count), **result}
