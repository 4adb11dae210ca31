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


def both(w, name):
    """Weight and bias of a layer; no bias is None."""
    return w[f"{name}.weight"], w.get(f"{name}.bias")


def add(a, b):
    return [float(x) + float(y) for x, y in zip(a, b, strict=True)]


def sigmoid(z):
    return 1.0 / (1.0 + math.exp(-z))


def relu(x):
    return [max(0.0, v) for v in x]


def gelu(x):
    return [0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x]


def two_layers(x, w, first, second):
    return linear(relu(linear(x, *both(w, first))), *both(w, second))


def feed_forward(x, w, fc1, fc2):
    return linear(gelu(linear(x, *both(w, fc1))), *both(w, fc2))


def layer_norm(x, weight, bias, eps=1e-6):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + eps)
    return [(v - mean) / deviation * float(s) + float(t) for v, s, t in zip(x, weight, bias, strict=True)]


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
            p = sigmoid(z)
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


def attention(x, qkv, proj, heads, head_dim, valid, uniform_invalid=False):
    """Valid tokens attend valid tokens; the rows of `qkv` are queries, keys, values, each head after head.

    An invalid token takes in nothing, or with `uniform_invalid` all tokens alike.
    """
    inner, projected, out = heads * head_dim, [linear(token, *qkv) for token in x], []
    for n, token in enumerate(projected):
        mixed = []
        for first in range(0, inner, head_dim):
            logits = [
                sum(token[d] * other[inner + d] for d in range(first, first + head_dim)) / math.sqrt(head_dim)
                for other in projected
            ]
            weights = softmax(logits, valid) if valid[n] else [uniform_invalid / len(x)] * len(x)
            values = [other[2 * inner + first : 2 * inner + first + head_dim] for other in projected]
            mixed += weighted_sum(weights, values, head_dim)
        out.append(linear(mixed, *proj))
    return out


def encoder_block(x, w, norm1, qkv, proj, norm2, fc1, fc2, heads):
    """A pre-norm block of a transformer over valid tokens; its weights by their names."""
    normed = [layer_norm(token, *both(w, norm1)) for token in x]
    mixed = attention(normed, both(w, qkv), both(w, proj), heads, len(x[0]) // heads, [True] * len(x))
    x = [add(*pair) for pair in zip(x, mixed, strict=True)]
    return [add(token, feed_forward(layer_norm(token, *both(w, norm2)), w, fc1, fc2)) for token in x]


def executor(x, entity, valid, w, generator, layers, heads, head_dim, released=False):
    """generator: names of its two linear maps; layers: those of qkv, proj, fc1, fc2 of each.

    Scales are 1 + what the generator gives; invalid tokens end as zeros. In the released form scales are what it gives
    and statistics are over all tokens.
    """
    width, counted = len(x[0]), [True] * len(x) if released else valid
    parameters = two_layers(entity, w, *generator)

    def norm(tokens, index):
        start = 2 * width * index
        scale = [float(not released) + s for s in parameters[start + width : start + 2 * width]]
        return adaptive_norm(tokens, scale, parameters[start : start + width], counted)

    for i, (qkv, proj, fc1, fc2) in enumerate(layers):
        mixed = attention(norm(x, 2 * i), both(w, qkv), both(w, proj), heads, head_dim, valid, released)
        x = [add(*pair) for pair in zip(x, mixed, strict=True)]
        x = [add(token, feed_forward(n, w, fc1, fc2)) for token, n in zip(x, norm(x, 2 * i + 1), strict=True)]
    return x if released else [token if ok else [0.0] * width for token, ok in zip(x, valid, strict=True)]


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
