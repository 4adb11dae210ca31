"""The released form once more, a sample and a number at a time, from weights under the authors' names.

Built on the formulas of `reference.py`; no torch, no broadcasting. `w` maps the checkpoint's names to numpy arrays.
"""

import math

import numpy as np
from reference import (
    add,
    attended_entities,
    both,
    cosine,
    encoder_block,
    executor,
    explicit_score,
    layer_norm,
    linear,
    mil_pooling,
    sigmoid,
    softmax,
    two_layers,
    weighted_sum,
)

ENGINE = "program_engine."


def random_weights(seed, rows, word_dim, dim, width, depth, types, layers, module_depth, heads, head_dim):
    """A state dict of the released form, small numbers, float64; with entries that nothing uses."""
    random, w = np.random.default_rng(seed), {}

    def put(name, *shape):
        w[name] = random.normal(0, 0.4, shape)

    def pair(name, out, *into):
        put(f"{name}.weight", out, *into)
        put(f"{name}.bias", out)

    put("txt_enc.embed.weight", rows, word_dim)
    for side in ("", "_reverse"):
        put(f"txt_enc.sent_enc.weight_ih_l0{side}", 3 * dim // 2, word_dim)
        put(f"txt_enc.sent_enc.weight_hh_l0{side}", 3 * dim // 2, dim // 2)
        put(f"txt_enc.sent_enc.bias_ih_l0{side}", 3 * dim // 2)
        put(f"txt_enc.sent_enc.bias_hh_l0{side}", 3 * dim // 2)
    pair("img_enc.proj", dim, width, 1, 1)
    pair("noun_encoder", dim, word_dim)
    encoder = "concept_net.encoder."
    put(encoder + "cls_token", 1, 1, dim)
    put(encoder + "pos_embed", 1, 197, dim)
    put(encoder + "head.weight", 3, dim)
    for block in range(depth):
        head = f"{encoder}blocks.{block}."
        for norm in ("norm1", "norm2"):
            pair(f"{head}{norm}", dim)
        pair(f"{head}attn.qkv", 3 * dim, dim)
        pair(f"{head}attn.proj", dim, dim)
        pair(f"{head}mlp.fc1", 4 * dim, dim)
        pair(f"{head}mlp.fc2", dim, 4 * dim)
    pair(encoder + "norm", dim)
    for pool in ("fg_net", "bg_net"):
        pair(f"concept_net.{pool}.attention.0", dim // 2, dim)
        pair(f"concept_net.{pool}.attention.2", 1, dim // 2)
    attend = ENGINE + "query_attention."
    for kind in range(types):
        pair(f"{attend}global_emb_fn.{kind}", dim, dim)
    pair(f"{attend}guide_emb_fn.0", dim, 2 * dim)
    for name, out in (("key2att", dim), ("feat2att", dim), ("to_alpha", 1)):
        pair(f"{attend}att_fn.{name}", out, dim)
    pair(ENGINE + "instruction_generator.mlpencoder.model.0.fc", dim, dim)
    pair(ENGINE + "instruction_generator.mlpencoder.model.1.fc", layers * types, dim)
    for index in (0, 1):
        pair(f"{ENGINE}out_proj.model.{index}.fc", dim, dim)
        pair(f"Attention_EM.attention.{2 * index}", dim, dim)
        pair(f"Attention_IS.attention.{2 * index}", dim, dim)
    pair("Transform_m.0", dim, dim)
    w["temperature"] = np.array([1.3])
    for layer in range(layers):
        for kind in range(types):
            head = f"{ENGINE}executors.layer{layer}.instruction_type{kind}."
            for pair_index in range(module_depth):
                attention, mlp = (f"{head}module.layers.{pair_index}.{part}." for part in (0, 1))
                put(f"{attention}norm.running_mean", dim)
                put(f"{attention}fn.to_qkv.weight", 3 * heads * head_dim, dim)
                pair(f"{attention}fn.to_out.0", dim, heads * head_dim)
                pair(f"{mlp}fn.net.0", 4 * dim, dim)
                pair(f"{mlp}fn.net.3", dim, 4 * dim)
            pair(f"{head}params_generator.model.0.fc", 4 * dim, dim)
            pair(f"{head}params_generator.model.1.fc", 4 * module_depth * dim, 4 * dim)
    return w


def gru(w, inputs, side):
    """One direction over vectors in the order of time -> its states, in the order given."""
    hidden = w["txt_enc.sent_enc.weight_hh_l0"].shape[1]
    state, states = [0.0] * hidden, []
    for x in reversed(inputs) if side else inputs:
        a = linear(x, w[f"txt_enc.sent_enc.weight_ih_l0{side}"], w[f"txt_enc.sent_enc.bias_ih_l0{side}"])
        b = linear(state, w[f"txt_enc.sent_enc.weight_hh_l0{side}"], w[f"txt_enc.sent_enc.bias_hh_l0{side}"])
        r = [sigmoid(v) for v in add(a[:hidden], b[:hidden])]
        z = [sigmoid(v) for v in add(a[hidden : 2 * hidden], b[hidden : 2 * hidden])]
        n = [math.tanh(a[2 * hidden + i] + r[i] * b[2 * hidden + i]) for i in range(hidden)]
        state = [(1 - z[i]) * n[i] + z[i] * state[i] for i in range(hidden)]
        states.append(state)
    return states[::-1] if side else states


def text(w, ids):
    """ids of one text -> unit sentence, words."""
    inputs = [list(w["txt_enc.embed.weight"][row]) for row in ids]
    forward, backward = gru(w, inputs, ""), gru(w, inputs, "_reverse")
    words = [f + b for f, b in zip(forward, backward, strict=True)]
    sentence = forward[-1] + backward[0]
    length = math.sqrt(sum(v * v for v in sentence))
    return [v / length for v in sentence], words


def image_tokens(w, feature_map):
    """[W,h,w] -> tokens row by row."""
    width, height, columns = feature_map.shape
    weight = w["img_enc.proj.weight"].reshape(-1, width)
    return [linear(feature_map[:, y, x], weight, w["img_enc.proj.bias"]) for y in range(height) for x in range(columns)]


def encode(w, tokens, depth, heads):
    """The concept encoder: class token in front, one row of the positions for all, class token dropped."""
    encoder = "concept_net.encoder."
    row = w[encoder + "pos_embed"][0, len(tokens) + 1]
    x = [add(token, row) for token in [list(w[encoder + "cls_token"][0, 0]), *tokens]]
    for block in range(depth):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        x = encoder_block(x, w, *(f"{encoder}blocks.{block}.{part}" for part in parts), heads)
    return [layer_norm(token, *both(w, encoder + "norm")) for token in x[1:]]


def pool(w, name, tokens):
    head = f"concept_net.{name}.attention."
    u, c = both(w, head + "2")
    return mil_pooling(tokens, *both(w, head + "0"), u[0], c[0])[0]


def executor_of(w, layer, kind, x, entity, valid, module_depth, heads, head_dim):
    head, layers = f"{ENGINE}executors.layer{layer}.instruction_type{kind}.", []
    for i in range(module_depth):
        first, second = (f"{head}module.layers.{i}.{part}.fn." for part in (0, 1))
        layers.append((first + "to_qkv", first + "to_out.0", second + "net.0", second + "net.3"))
    generator = [f"{head}params_generator.model.{i}.fc" for i in (0, 1)]
    return executor(x, entity, valid, w, generator, layers, heads, head_dim, released=True)


def fuse(w, sentence, words, tokens, fg, concept_ids, padded_to, opt):
    """One query -> f. `padded_to`: number of concepts of the batch's longest."""
    attend = ENGINE + "query_attention."
    types, layers = opt["num_type_instruction"], opt["engine_depth"]
    query = [both(w, f"{attend}global_emb_fn.{kind}") for kind in range(types)]
    parts = [both(w, f"{attend}{name}") for name in ("guide_emb_fn.0", "att_fn.key2att", "att_fn.feat2att")]
    alpha = both(w, f"{attend}att_fn.to_alpha")
    entities, _ = attended_entities(sentence, words, [True] * len(words), query, *parts, alpha)
    mlp = ENGINE + "instruction_generator.mlpencoder.model."
    logits = two_layers(sentence, w, mlp + "0.fc", mlp + "1.fc")
    concepts = [linear(w["txt_enc.embed.weight"][row], *both(w, "noun_encoder")) for row in concept_ids]
    missing = padded_to - len(concepts)
    x = [fg, *tokens, *concepts, *([[0.0] * len(fg)] * missing)]
    valid = [True] * (len(x) - missing) + [False] * missing
    for layer in range(layers):
        weights = softmax(logits[layer * types : (layer + 1) * types])
        total = [[0.0] * len(fg) for _ in x]
        for kind, weight in enumerate(weights):
            settings = (opt["module_depth"], opt["module_heads"], opt["module_dim_head"])
            result = executor_of(w, layer, kind, x, entities[kind], valid, *settings)
            total = [add(a, [weight * v for v in b]) for a, b in zip(total, result, strict=True)]
        x = total
    mean = weighted_sum([1.0 / len(tokens)] * len(tokens), x[1 : len(tokens) + 1], len(fg))
    return two_layers(mean, w, *(f"{ENGINE}out_proj.model.{i}.fc" for i in (0, 1)))


def images(w, maps, opt):
    """Feature maps -> (raw tokens, encoded tokens, fg, bg) of each."""
    found = []
    for feature_map in maps:
        raw = image_tokens(w, feature_map)
        encoded = encode(w, raw, opt["concept_depth"], opt["concept_heads"])
        found.append((raw, encoded, pool(w, "fg_net", encoded), pool(w, "bg_net", encoded)))
    return found


def score(w, sentence, fused, reference_bg, fg, bg):
    u = linear(sentence, *both(w, "Transform_m.0"))
    a = softmax(two_layers(sentence, w, "Attention_EM.attention.0", "Attention_EM.attention.2"))
    return cosine(fused, fg) + explicit_score(u, a, fg) + cosine(reference_bg, bg)


def concept_logits(w, reference, target, concept_ids, opt):
    bag = pool(w, "fg_net", encode(w, reference[0] + target[0], opt["concept_depth"], opt["concept_heads"]))
    projected = [linear(w["txt_enc.embed.weight"][row], *both(w, "noun_encoder")) for row in concept_ids]
    return [sum(a * b for a, b in zip(bag, concept, strict=True)) for concept in projected]
