"""Matching of queries and gallery images: terms in matrix products; the tensor [Q,G,D] is never built.

Source: Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358);
Delmas et al., "ARTEMIS", ICLR 2022. The equations and their tests: docs/equations.md.

Q queries, G gallery images, C clauses of a query, T weighted terms, D width; q and g of them at a time.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import check_positive, check_shape

TERMS = ("fused", "explicit", "background", "implicit", "change")
MAX_TEMPERATURE = math.log(100.0)
GALLERY_BLOCK = 4096  # rows of the gallery prepared at a time: bounds the memory beside the result
VECTOR_BLOCK = 256  # the same for one query, for each thread: a block and its squares stay in a core's own cache
VECTOR_SPAN = 16384  # rows whose products are joined to scores at a time
TINY = 1e-24  # squared length below which a vector counts as zero
NEAREST = 1e-3  # added to squared distances from the reference, lest one be zero


def _inverse_length(squared: Tensor) -> Tensor:
    """1/sqrt, and 0 with gradient 0 where the length is zero."""
    positive = squared > TINY
    return torch.where(positive, torch.rsqrt(torch.where(positive, squared, 1.0)), 0.0)


def _unit(x: Tensor) -> Tensor:
    return x * _inverse_length(x.square().sum(dim=-1, keepdim=True))


def _full(x: Tensor) -> Tensor:
    """Half precision is for storage and transport: sums of products are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Matching(nn.Module):
    """Scores query encodings against gallery encodings, by the sum of some of these terms:

    S(q, t) = cos(f, t_fg)                                     "fused"
            + sum_c (u_c / |u_c|) . (a_c * t_fg) / |a_c * t_fg|  "explicit", u_c = W m_c + b, a_c = softmax(MLP(m_c))
            + cos(r_bg, t_bg)                                  "background"
            + cos(b * r_fg, b * t_fg)                          "implicit", b = softmax(mean_c MLP'(m_c))
            + cos(d, t_fg/|t_fg| - r_fg/|r_fg|)                "change", nearly: see below

    f is the fused vector, d the change that the query asks for, m_c the sentence, or of a caption in clauses each
    one's; r the reference. A term with a zero vector in it is 0. "background" says that all stays, "implicit" what the
    text does not speak of; "change" looks at what is different alone, whatever the reference shows. In products, a
    weighted term of a vector v and weights w, be it explicit (u_c, a_c) or implicit (b * r_fg, b), is
    ((v / |v|) * w) . t_fg / sqrt((w * w) . (t_fg * t_fg)), and "change" of unit vectors d, t, r is
    (d . t - d . r) / sqrt(2 - 2 r . t + 0.001).

    Args:
        dim: D. terms: which are summed; leaving one out is an ablation.
        temperature: natural logarithm of the factor on scores in the loss. learn_temperature: whether it is trained.
        released: the authors' form, whose factor is not bounded; ours never exceeds 100.

    >>> terms = ["fused", "explicit", "background"]
    >>> matching = Matching(dim=8, terms=terms, temperature=2.65926, learn_temperature=True, released=False)
    >>> fused, sentence, reference_bg = torch.randn(3, 2, 8)
    >>> query = matching.query(fused, sentence, reference_bg)
    >>> gallery = matching.gallery(fg=torch.randn(100, 8), bg=torch.randn(100, 8))
    >>> matching.score(query, gallery).shape
    torch.Size([2, 100])

    Source: Zhao & Xu 2023, progressive fusion (f against t_fg); explicit and background terms: the released code;
    explicit and implicit: ARTEMIS, where they are two attentions of one sentence; change: ours.
    """

    def __init__(self, *, dim: int, terms: Sequence[str], temperature: float, learn_temperature: bool, released: bool):
        super().__init__()
        check_positive(dim=dim)
        self.max_temperature = math.inf if released else MAX_TEMPERATURE
        unknown = [term for term in terms if term not in TERMS]
        if unknown or not terms or len(set(terms)) != len(terms):
            raise ConfigError(f"matching.terms is {terms}, expected one or more, each once, of: {', '.join(TERMS)}")
        if not math.isfinite(temperature) or temperature > self.max_temperature:
            raise ConfigError(
                f"matching.temperature is {temperature}; it is the logarithm of the factor on scores, at most "
                f"log(100) = {MAX_TEMPERATURE:.3f}"
            )
        self.dim = dim
        self.terms = tuple(term for term in TERMS if term in terms)
        if "explicit" in terms:
            self.transform = nn.Linear(dim, dim)  # u
            self.attention = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))  # a, before the softmax
        if "implicit" in terms:
            self.implicit_attention = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))  # b, before it
        value = torch.tensor([float(temperature)])
        if learn_temperature:
            self.temperature = nn.Parameter(value)
        else:
            self.register_buffer("temperature", value)

    def factor(self) -> Tensor:
        """exp(temperature) [1]: what the loss multiplies scores by."""
        return self.temperature.clamp(max=self.max_temperature).exp()

    def query(
        self,
        fused: Tensor,
        sentence: Tensor,
        reference: Tensor,
        present: Tensor | None = None,
        change: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """-> encoding: fused; with the explicit term text (u) and attention (a), without the implicit term background,
        with the implicit term image (b * r_fg) and image_attention (b), with the change term change (d) and origin.

        fused [Q,D]; sentence [Q,D], or of clauses [Q,C,D] with `present` [Q,C], which of them there are; reference
        [Q,D]: r_bg, or for the implicit term r_fg; change [Q,D]; origin [Q,D]: r_fg as gallery images are encoded.
        """
        check_shape("fused vectors [Q,D]", fused, None, self.dim)
        clauses = [] if present is None else [present.shape[1]]
        check_shape("sentence vectors [Q,D] or [Q,C,D]", sentence, fused.shape[0], *clauses, self.dim)
        check_shape("reference vectors [Q,D]", reference, fused.shape[0], self.dim)
        encoding = {"fused": fused, **self.weighted(sentence, reference, present)}
        if "change" in self.terms:
            check_shape("change vectors [Q,D]", change, fused.shape[0], self.dim)
            check_shape("origins [Q,D]", origin, fused.shape[0], self.dim)
            encoding |= {"change": change, "origin": origin}
        return encoding

    def weighted(self, sentence: Tensor, reference: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """What `query` gives but for fused."""
        encoding = {} if "implicit" in self.terms else {"background": reference}
        if "explicit" in self.terms:
            encoding["text"] = self.transform(sentence)
            encoding["attention"] = self.attention(sentence).softmax(dim=-1)
            if present is not None:
                encoding["text"] = encoding["text"].masked_fill(~present[..., None], 0.0)
                encoding["attention"] = encoding["attention"].masked_fill(~present[..., None], 0.0)
        if "implicit" in self.terms:
            logits = self.implicit_attention(sentence)
            if present is not None:
                logits = logits.masked_fill(~present[..., None], 0.0).sum(1) / present.sum(1, keepdim=True).clamp_min(1)
            encoding["image_attention"] = logits.softmax(dim=-1)
            encoding["image"] = encoding["image_attention"] * reference
        return encoding

    def gallery(self, fg: Tensor, bg: Tensor | None = None) -> dict[str, Tensor]:
        """Both [G,D] -> encoding: fg, and bg where given, for the background term."""
        check_shape("gallery foregrounds [G,D]", fg, None, self.dim)
        if bg is None:
            return {"fg": fg}
        check_shape("gallery backgrounds [G,D]", bg, fg.shape[0], self.dim)
        return {"fg": fg, "bg": bg}

    def score(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor], chunk: int = 256) -> Tensor:
        """Scores [Q,G]. Differentiable where an input needs a gradient; otherwise in place, `chunk` queries at a time.

        Memory beyond the result does not grow with Q or G. Half precision is read as stored and computed in float32.
        """
        query = self._entries(query, self._query_keys(), "query", "Q")
        gallery = self._entries(gallery, self._gallery_keys(), "gallery", "G")
        check_positive(chunk=chunk)
        inputs = [*query.values(), *gallery.values()]
        with torch.autocast(inputs[0].device.type, enabled=False):  # bf16 products would blur the ranking
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
                return self._score_block(self._query_side(query, spare=True), self._gallery_side(gallery))
            return self._score_in_place(query, gallery, chunk)

    def score_terms(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term of the score by itself, {term: [Q,G]}: their sum is `score`. For few images: nothing is chunked."""
        given, gallery = self._entries(query, self._query_keys(), "query", "Q"), self.gallery_factors(gallery)
        names, query = [name for name, _, _ in self._weighted(given)], self._query_side(given)
        cosines, found = iter(range(0, 2 * self.dim, self.dim)), {}
        with torch.autocast(next(iter(query.values())).device.type, enabled=False):
            for term in self.terms:
                if term in ("fused", "background"):
                    columns = slice(start := next(cosines), start + self.dim)
                    found[term] = query["cosines"][:, columns] @ gallery["cosines"][:, columns].T
                elif term == "change":
                    found[term] = self._change(query, gallery)
                else:
                    own = [place for place, name in enumerate(names) if name == term]
                    side = {key: query[key][:, own] for key in ("weighted", "squares")}
                    found[term] = self._score_block(side, gallery)
        return found

    def query_factors(self, query: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Query encodings -> factors of the score, for whoever computes it elsewhere (a vector database):

        S = cosines . cosines^T + sum_t (weighted_t . weighted^T) / sqrt(squares_t . squares^T)
          + (change . units^T - change . origin) / sqrt(2 - 2 origin . units^T + NEAREST)

        with those of `gallery_factors`: cosines [Q, D or 2D]; weighted (v/|v|) * w and squares w * w of the T weighted
        terms, both [Q,T,D]; change and origin [Q,D], unit vectors. Where the product of the squares is 0, its fraction
        counts as 0.
        """
        return self._query_side(self._entries(query, self._query_keys(), "query", "Q"))

    def gallery_factors(self, gallery: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gallery encodings -> their side of `query_factors`, [G,D] each: weighted is t_fg, squares t_fg * t_fg, units
        t_fg / |t_fg|."""
        return self._gallery_side(self._entries(gallery, self._gallery_keys(), "gallery", "G"))

    def _query_keys(self) -> list[str]:
        of = {"fused": ["fused"], "background": ["background"]}
        of |= {"explicit": ["text", "attention"], "implicit": ["image", "image_attention"]}
        of |= {"change": ["change", "origin"]}
        return [key for term in self.terms for key in of[term]]

    def _gallery_keys(self) -> list[str]:
        keys = ["fg"] if set(self.terms) != {"background"} else []
        return [*keys, *(["bg"] if "background" in self.terms else [])]

    def _entries(self, given: Mapping[str, Tensor], keys: Sequence[str], side: str, rows: str) -> dict[str, Tensor]:
        """The entries that the terms need, their shapes checked; each has as many rows as the first."""
        if missing := [key for key in keys if key not in given]:
            raise ValueError(f"encodings lack {', '.join(missing)}; make them with query() and gallery()")
        for key in keys:
            clauses = [None] if key in ("text", "attention") and given[key].ndim == 3 else []
            check_shape(f"{side} {key} [{rows},D]", given[key], given[keys[0]].shape[0], *clauses, self.dim)
        return {key: given[key] for key in keys}

    def _weighted(self, query: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """The weighted terms of queries: name, vector v [q,D], weights w [q,D]; the explicit one once a clause."""
        found = []
        if "explicit" in self.terms:
            sides = (query[key].unbind(1) if query[key].ndim == 3 else [query[key]] for key in ("text", "attention"))
            found += [("explicit", *clause) for clause in zip(*sides, strict=True)]
        if "implicit" in self.terms:
            found.append(("implicit", query["image"], query["image_attention"]))
        return found

    def _query_side(self, query: dict[str, Tensor], spare: bool = False) -> dict[str, Tensor]:
        """Factors of the products: cosines [q, D or 2D]; weighted and squares, both [q,T,D]; `spare`: without weighted
        terms that none of the queries has."""
        side = {}
        cosines = [name for name in ("fused", "background") if name in self.terms]
        if cosines:
            side["cosines"] = torch.cat([_unit(_full(query[name])) for name in cosines], dim=-1)
        pairs = [(vector, weights) for _, vector, weights in self._weighted(query)]
        if spare and len(pairs) > 1:
            pairs = [pair for pair in pairs if bool(pair[1].any())] or pairs[:1]
        if pairs:
            side["weighted"] = torch.stack([_unit(_full(vector)) * _full(weights) for vector, weights in pairs], dim=1)
            side["squares"] = torch.stack([_full(weights).square() for _, weights in pairs], dim=1)
        if "change" in self.terms:
            side |= {name: _unit(_full(query[name])) for name in ("change", "origin")}
        return side

    def _gallery_side(self, gallery: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of the gallery: cosines [g, D or 2D]; weighted t_fg and squares t_fg * t_fg, both [g,D]."""
        side = {}
        cosines = [key for term, key in (("fused", "fg"), ("background", "bg")) if term in self.terms]
        if cosines:
            side["cosines"] = torch.cat([_unit(_full(gallery[key])) for key in cosines], dim=-1)
        if {"explicit", "implicit"} & set(self.terms):
            fg = _full(gallery["fg"])
            side["weighted"], side["squares"] = fg, fg.square()
        if "change" in self.terms:
            # The first cosines are these unit vectors where there is a fused term.
            side["units"] = side["cosines"][:, : self.dim] if "fused" in self.terms else _unit(_full(gallery["fg"]))
        return side

    @staticmethod
    def _pairs(query: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """weighted and squares [q,D] of each weighted term."""
        if "weighted" not in query:
            return []
        return list(zip(query["weighted"].unbind(1), query["squares"].unbind(1), strict=True))

    @staticmethod
    def _change(query: Mapping[str, Tensor], gallery: Mapping[str, Tensor]) -> Tensor:
        at_reference = (query["change"] * query["origin"]).sum(1, keepdim=True)  # [q,1]
        distance = 2 + NEAREST - 2 * (query["origin"] @ gallery["units"].T)
        return (query["change"] @ gallery["units"].T - at_reference) * distance.rsqrt()

    @staticmethod
    def _score_block(query: dict[str, Tensor], gallery: dict[str, Tensor]) -> Tensor:
        total = query["cosines"] @ gallery["cosines"].T if "cosines" in query else None  # [q,g]
        for weighted, squares in Matching._pairs(query):
            term = (weighted @ gallery["weighted"].T) * _inverse_length(squares @ gallery["squares"].T)
            total = term if total is None else total + term
        if "change" in query:
            term = Matching._change(query, gallery)
            total = term if total is None else total + term
        return total

    @torch.no_grad()
    def _score_in_place(self, query: dict[str, Tensor], gallery: dict[str, Tensor], chunk: int) -> Tensor:
        first, image = (next(iter(side.values())) for side in (query, gallery))
        queries, images = first.shape[0], image.shape[0]
        dtype = torch.promote_types(_full(first[:0]).dtype, _full(image[:0]).dtype)
        out = torch.empty(queries, images, dtype=dtype, device=image.device)
        if queries == 1:
            for g in range(0, images, VECTOR_SPAN):
                span = {key: value[g : g + VECTOR_SPAN] for key, value in gallery.items()}
                self._score_vector(query, span, out[0, g : g + VECTOR_SPAN])
            return out
        for g in range(0, images, GALLERY_BLOCK):
            side = self._gallery_side({key: value[g : g + GALLERY_BLOCK] for key, value in gallery.items()})
            for q in range(0, queries, chunk):
                factors = self._query_side({key: value[q : q + chunk] for key, value in query.items()}, spare=True)
                total = None
                if "cosines" in factors:
                    total = factors["cosines"] @ side["cosines"].T
                for weighted, squares in self._pairs(factors):
                    inverse = (squares @ side["squares"].T).clamp_(min=TINY).rsqrt_()
                    term = (weighted @ side["weighted"].T).mul_(inverse)
                    total = term if total is None else total.add_(term)
                if "change" in factors:
                    term = self._change(factors, side)
                    total = term if total is None else total.add_(term)
                out[q : q + chunk, g : g + GALLERY_BLOCK] = total
        return out

    def _score_vector(self, query: dict[str, Tensor], gallery: dict[str, Tensor], out: Tensor) -> None:
        """One query, into `out` [g]: products of a matrix with a vector, several times faster than with a matrix of one
        row. Each term is (x . v) / sqrt((x * x) . w), w = 1 where the vector's whole length counts. A block is read
        from memory once; all else happens in buffers that are made once.
        """
        asked: dict[str, list[tuple[Tensor, Tensor | None]]] = {}  # of each entry of the gallery (v, w), None for 1
        for term, key in (("background", "bg"), ("fused", "fg")):
            if term in self.terms:
                asked.setdefault(key, []).append((_unit(_full(query[term][0]).to(out)), None))
        for _, vector, weights in self._weighted(query):
            weights = _full(weights[0]).to(out)
            if bool(weights.any()):
                pair = (_unit(_full(vector[0]).to(out)) * weights, weights.square())
                asked.setdefault("fg", []).append(pair)
        at_reference = None
        if "change" in self.terms:  # two cosines, which come last
            change, origin = (_unit(_full(query[name][0]).to(out)) for name in ("change", "origin"))
            asked.setdefault("fg", []).extend([(change, None), (origin, None)])
            at_reference = change @ origin
        step = VECTOR_BLOCK * torch.get_num_threads() if out.device.type == "cpu" else VECTOR_SPAN
        read, squares = out.new_empty(2, min(step, len(out)), self.dim)
        ones, products = out.new_ones(self.dim), out.new_empty(sum(map(len, asked.values())), 2, len(out))
        for start in range(0, len(out), step):
            place = 0
            for key, pairs in asked.items():
                rows = gallery[key][start : start + step]
                if rows.dtype != out.dtype:
                    rows = read[: len(rows)].copy_(rows)
                found = products[place : place + len(pairs), :, start : start + step]
                place += len(pairs)
                if all(weights is None for _, weights in pairs):
                    torch.linalg.vector_norm(rows, dim=1, out=found[0, 1]).square_()
                    found[1:, 1] = found[0, 1]
                else:
                    squared = torch.mul(rows, rows, out=squares[: len(rows)])
                    for (_, weights), lengths in zip(pairs, found[:, 1], strict=True):
                        torch.mv(squared, ones if weights is None else weights, out=lengths)
                for (vector, _), numerators in zip(pairs, found[:, 0], strict=True):
                    torch.mv(rows, vector, out=numerators)
        found = products[:, 0].mul_(products[:, 1].clamp_(min=TINY).rsqrt_())
        if at_reference is None:
            torch.sum(found, dim=0, out=out)
            return
        torch.sum(found[:-2], dim=0, out=out)
        out.addcmul_(found[-2].sub_(at_reference), found[-1].mul_(-2).add_(2 + NEAREST).rsqrt_())
