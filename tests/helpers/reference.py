"""The model's formulas once more, one sample and one number at a time: slow, plain, independent of the implementation.

Everything takes and gives nested lists (or numpy arrays, which iterate alike) of one sample; no torch, no broadcasting.
A weight matrix is a list of rows, one per output. `valid` lists a boolean per token.
"""

import math


def linear(x, weight, bias=None):
    out = []
    for i, row in enumerate(weight):
        total = 0.0 if bias is None else float(bias[i])
        for w, v in zip(row, x, strict=True):
            total += float(w) * float(v)
        out.append(total)
    return out


def relu(x):
    return [max(0.0, v) for v in x]


def gelu(x):
    return [0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x]


def softmax(logits, valid=None):
    """Exponentials over their sum, of the valid entries only; all zeros where none is valid."""
    valid = [True] * len(logits) if valid is None else valid
    total = sum(math.exp(z) for z, ok in zip(logits, valid, strict=True) if ok)
    return [math.exp(z) / total if ok else 0.0 for z, ok in zip(logits, valid, strict=True)]


def weighted_sum(weights, vectors, width):
    out = [0.0] * width
    for weight, vector in zip(weights, vectors, strict=True):
        for d in range(width):
            out[d] += weight * float(vector[d])
    return out


def mil_pooling(x, v_weight, v_bias, u, c):
    """sum_n a_n x_n with a = softmax_n(u . tanh(V x_n + b) + c) -> pooled, weights."""
    logits = [linear([math.tanh(h) for h in linear(token, v_weight, v_bias)], [u], [c])[0] for token in x]
    weights = softmax(logits)
    return weighted_sum(weights, x, len(x[0])), weights


def focal_loss(logits, labels, alpha, gamma):
    """Mean over samples and concepts."""
    total, count = 0.0, 0
    for row, marks in zip(logits, labels, strict=True):
        for z, y in zip(row, marks, strict=True):
            p = 1.0 / (1.0 + math.exp(-z))
            if y == 1:
                total -= alpha * (1.0 - p) ** gamma * math.log(p)
            else:
                total -= (1.0 - alpha) * p**gamma * math.log(1.0 - p)
            count += 1
    return total / count


def attended_entities(m, words, valid, query, guide, key, feature, alpha):
    """query: a (weight, bias) for each step; the others one (weight, bias) each -> entities, word weights by step."""
    entity, entities, all_weights = [0.0] * len(m), [], []
    for weight, bias in query:
        g = relu(linear(linear(m, weight, bias) + entity, *guide))
        k = linear(g, *key)
        logits = []
        for word in words:
            f = linear(word, *feature)
            logits.append(linear([math.tanh(a + b) for a, b in zip(k, f, strict=True)], *alpha)[0])
        weights = softmax(logits, valid)
        entity = weighted_sum(weights, words, len(m))
        entities.append(entity)
        all_weights.append(weights)
    return entities, all_weights


def adaptive_norm(x, scale, shift, valid, eps=1e-6):
    """Each channel over the valid tokens: mean 0 and variance 1, then scaled and shifted."""
    out = [[0.0] * len(scale) for _ in x]
    for d in range(len(scale)):
        values = [float(token[d]) for token, ok in zip(x, valid, strict=True) if ok]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        for n, token in enumerate(x):
            out[n][d] = (float(token[d]) - mean) / math.sqrt(variance + eps) * scale[d] + shift[d]
    return out


def attention(x, qkv, proj, proj_bias, heads, head_dim, valid):
    """Valid tokens attend valid tokens; the rows of `qkv` are queries, keys, values, each head after head."""
    inner = heads * head_dim
    projected = [linear(token, qkv) for token in x]
    out = []
    for n, token in enumerate(projected):
        mixed = [0.0] * inner
        if valid[n]:
            for h in range(heads):
                first = h * head_dim
                logits = []
                for other in projected:
                    dot = 0.0
                    for d in range(first, first + head_dim):
                        dot += token[d] * other[inner + d]
                    logits.append(dot / math.sqrt(head_dim))
                weights = softmax(logits, valid)
                for weight, other in zip(weights, projected, strict=True):
                    for d in range(first, first + head_dim):
                        mixed[d] += weight * other[2 * inner + d]
        out.append(linear(mixed, proj, proj_bias))
    return out


def executor(x, entity, valid, w, depth, heads, head_dim):
    """`w`: the executor's weights by name. Scales are 1 + what the generator gives; invalid tokens end as zeros."""
    width = len(x[0])
    hidden = relu(linear(entity, w["generator.0.weight"], w["generator.0.bias"]))
    parameters = linear(hidden, w["generator.2.weight"], w["generator.2.bias"])

    def norm(tokens, index):
        start = 2 * width * index
        shift = parameters[start : start + width]
        scale = [1.0 + s for s in parameters[start + width : start + 2 * width]]
        return adaptive_norm(tokens, scale, shift, valid)

    def add(tokens, changes):
        return [[a + b for a, b in zip(t, c, strict=True)] for t, c in zip(tokens, changes, strict=True)]

    x = [[float(v) for v in token] for token in x]
    for i in range(depth):
        qkv, proj = w[f"attention.{i}.qkv.weight"], w[f"attention.{i}.proj.weight"]
        x = add(x, attention(norm(x, 2 * i), qkv, proj, w[f"attention.{i}.proj.bias"], heads, head_dim, valid))
        changes = []
        for token in norm(x, 2 * i + 1):
            inside = gelu(linear(token, w[f"mlp.{i}.fc1.weight"], w[f"mlp.{i}.fc1.bias"]))
            changes.append(linear(inside, w[f"mlp.{i}.fc2.weight"], w[f"mlp.{i}.fc2.bias"]))
        x = add(x, changes)
    return [token if ok else [0.0] * width for token, ok in zip(x, valid, strict=True)]


def cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return dot / length if length else 0.0


def explicit_score(u, a, t):
    """cos(u, a * t)."""
    return cosine(u, [float(x) * float(y) for x, y in zip(a, t, strict=True)])


def contrastive_loss(scores, temperature, also_right=None):
    """Mean over rows of -log of the diagonal's share; other columns that are right as well are left out."""
    total = 0.0
    for i, row in enumerate(scores):
        rivals = [j for j in range(len(row)) if j == i or also_right is None or not also_right[i][j]]
        factor = math.exp(temperature)
        total -= factor * row[i] - math.log(sum(math.exp(factor * row[j]) for j in rivals))
    return total / len(scores)
