"""The released code's numbers: one golden case, made elsewhere with random weights in float64.

The case is no part of the project: NEUCORE_RELEASED_CASE names its .npz file, otherwise it is looked up at
`../shared/data/official/cirr_small.npz` beside the checkout. Its keys: w/ weights, in/ inputs, out/ results, grad/
gradient norms. Of a large array 256 drawn entries, the L2 norm and the sum are kept.

Shapes: B batch, N = 49 image tokens, L words, K concepts of a query, C vocabulary, D = 64.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neucore_plugin.models.concept_alignment import ConceptAlignment, ConceptAlignmentLoss
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.progressive_fusion import ProgressiveFusion

DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "official" / "cirr_small.npz"
TOLERANCE = 1e-5


def renamed(name: str) -> str | None:
    """A weight's name in the released checkpoint -> its name in `Released`, None where nothing uses it."""
    engine = "program_engine."
    if name.startswith(("Attention_IS.", "concept_net.encoder.head", "concept_net.encoder.patch_embed")):
        return None  # no result depends on them
    for old, new in (
        ("temperature", "matching.temperature"),
        ("Transform_m.0.", "matching.transform."),
        ("Attention_EM.attention.", "matching.attention."),
        ("concept_net.encoder.", "alignment.encoder."),
        ("concept_net.fg_net.", "alignment.fg_pool."),
        ("concept_net.bg_net.", "alignment.bg_pool."),
        ("noun_encoder.", "alignment.classifier.projection."),
        (engine + "query_attention.global_emb_fn.", "fusion.attend.query."),
        (engine + "query_attention.guide_emb_fn.0.", "fusion.attend.guide."),
        (engine + "query_attention.att_fn.key2att.", "fusion.attend.key."),
        (engine + "query_attention.att_fn.feat2att.", "fusion.attend.feature."),
        (engine + "query_attention.att_fn.to_alpha.", "fusion.attend.alpha."),
        (engine + "instruction_generator.mlpencoder.model.0.fc.", "fusion.instructions.mlp.0."),
        (engine + "instruction_generator.mlpencoder.model.1.fc.", "fusion.instructions.mlp.2."),
        (engine + "out_proj.model.0.fc.", "fusion.output.0."),
        (engine + "out_proj.model.1.fc.", "fusion.output.2."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    if name.startswith(engine + "executors.layer"):
        layer, kind, rest = name.removeprefix(engine + "executors.layer").split(".", 2)
        head = f"fusion.executors.{layer}.{kind.removeprefix('instruction_type')}."
        if rest.startswith("params_generator.model."):
            index, rest = rest.removeprefix("params_generator.model.").split(".fc.")
            return f"{head}generator.{2 * int(index)}.{rest}"
        depth, _, part = rest.removeprefix("module.layers.").split(".", 2)
        for old, new in (
            ("fn.to_qkv.", f"attention.{depth}.qkv."),
            ("fn.to_out.0.", f"attention.{depth}.proj."),
            ("fn.net.0.", f"mlp.{depth}.fc1."),
            ("fn.net.3.", f"mlp.{depth}.fc2."),
        ):
            if part.startswith(old):
                return head + new + part.removeprefix(old)
    return name  # the BiGRU and the projection of the image features, which `Released` names as the checkpoint does


class Released(nn.Module):
    """The released model put together from this package's parts; encoders of text and image tokens as it has them."""

    def __init__(self, opt: dict, vocabulary: int, image_width: int):
        super().__init__()
        dim, word_dim = opt["embed_dim"], opt["word_dim"]
        self.txt_enc = nn.ModuleDict(
            {
                "embed": nn.Embedding(vocabulary, word_dim),
                "sent_enc": nn.GRU(word_dim, dim // 2, batch_first=True, bidirectional=True),
            }
        )
        self.img_enc = nn.ModuleDict({"proj": nn.Conv2d(image_width, dim, 1)})
        self.alignment = ConceptAlignment(
            dim, word_dim, opt["concept_depth"], opt["concept_heads"], bag="joint", released=True
        )
        self.fusion = ProgressiveFusion(
            dim,
            "mixture",
            steps=opt["num_type_instruction"],
            layers=opt["engine_depth"],
            module_depth=opt["module_depth"],
            heads=opt["module_heads"],
            head_dim=opt["module_dim_head"],
            released=True,
        )
        self.matching = Matching(dim, temperature=opt["temperature"])

    def text(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B,L], [B] -> sentence [B,D], words [B,L,D], mask [B,L]."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.txt_enc["embed"](ids), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, final = self.txt_enc["sent_enc"](packed)
        words, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=ids.shape[1])
        sentence = torch.cat([final[0], final[1]], dim=-1)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return sentence / sentence.norm(dim=-1, keepdim=True), words, mask

    def image(self, features: torch.Tensor) -> torch.Tensor:
        return self.img_enc["proj"](features).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def case() -> dict:
    path = Path(os.environ.get("NEUCORE_RELEASED_CASE") or DEFAULT)
    if not path.is_file():
        pytest.skip(f"the released code's golden case is not here: {path} (NEUCORE_RELEASED_CASE names another place)")
    with np.load(path) as arrays:
        values = {key: arrays[key] for key in arrays.files}
    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return {"values": values, "settings": settings}


@pytest.fixture(scope="module")
def model(case: dict) -> Released:
    values, settings = case["values"], case["settings"]
    image_width = values["in/main/img_src"].shape[1]
    built = Released(settings["opt"], settings["vocab_size"], image_width).double().eval()
    state, positions = {}, torch.zeros_like(built.alignment.encoder.pos_embed)
    for key, value in values.items():
        if not key.startswith("w/"):
            continue
        name, tensor = key.removeprefix("w/"), torch.from_numpy(value).double()
        if "pos_embed[" in name:  # only the rows that are read were kept
            positions[0, int(name.split(",")[1].rstrip("]"))] = tensor
        elif (new := renamed(name)) is not None:
            state[new] = tensor
    state["alignment.encoder.pos_embed"] = positions
    built.load_state_dict(state, strict=True)
    return built


def run(model: Released, case: dict, batch: str) -> dict[str, torch.Tensor]:
    """Everything `out/<batch>/` holds, under its names there."""
    inputs = {
        key: torch.from_numpy(case["values"][f"in/{batch}/{key}"])
        for key in ("img_src", "img_trg", "txt", "txt_len", "nouns", "nouns_len", "mil_labels")
    }
    alignment, fusion, matching = model.alignment, model.fusion, model.matching
    out = {}
    out["img_tokens_r"] = model.image(inputs["img_src"].double())
    out["img_tokens_t"] = model.image(inputs["img_trg"].double())
    out["m"], out["word_feats"], word_mask = model.text(inputs["txt"], inputs["txt_len"])
    reference, target = alignment.encode(out["img_tokens_r"]), alignment.encode(out["img_tokens_t"])
    for side, encoding in (("r", reference), ("t", target)):
        out.update({f"{side}_token": encoding["tokens"], f"{side}_fg": encoding["fg"], f"{side}_bg": encoding["bg"]})
    out["rt_fg"] = alignment.align(reference, target, out["img_tokens_r"], out["img_tokens_t"])["pooled"]

    embed = model.txt_enc["embed"]
    vocabulary = embed(torch.from_numpy(case["values"]["in/all_nouns_token"]))  # [C,Dw]
    out["cls_weights"] = alignment.classifier.project(vocabulary)
    out["cls_logits"] = alignment.classifier(out["rt_fg"], vocabulary)
    concept_mask = torch.arange(inputs["nouns"].shape[1])[None] < inputs["nouns_len"][:, None]
    concepts = alignment.classifier.project(embed(inputs["nouns"])) * concept_mask[..., None]
    out["concepts"] = concepts
    out["mil_loss"] = ConceptAlignmentLoss()(out["cls_logits"], inputs["mil_labels"].double())

    fused = fusion(reference["tokens"], reference["fg"], concepts, concept_mask, out["word_feats"], word_mask, out["m"])
    out["query_att_feats"], out["query_att_weights"] = fused["entities"], fused["word_weights"]
    out["instr_logits"], out["instr_weights"] = fusion.instructions.mlp(out["m"]), fused["instruction_weights"]
    out["executor_in"] = torch.cat([reference["fg"][:, None], reference["tokens"], concepts], dim=1)
    out["executor_mask"] = torch.cat([torch.ones(len(concepts), 50, dtype=torch.bool), concept_mask], dim=1)
    for kind, executor in enumerate(fusion.executors[0]):
        entity = fused["entities"][:, kind]
        out[f"adain_params_l0_t{kind}"] = executor.instantiate(entity).flatten(1)
        out[f"executor_out_l0_t{kind}"] = executor(out["executor_in"], entity, out["executor_mask"])
    out["hat_t"] = fused["fused"]

    query = matching.query(out["hat_t"], out["m"], reference["bg"])
    gallery = matching.gallery(target["fg"], target["bg"])
    out["Tr_m"] = nn.functional.normalize(query["text"], dim=-1)  # recorded after its division by the norm
    out["A_EM"] = query["attention"]
    for key, term in (("program_scores", "fused"), ("EM_scores", "explicit"), ("IS_scores", "background")):
        single = Matching(out["m"].shape[1], terms=[term])
        out[key] = single.score(query, gallery)
    out["scores"] = matching.score(query, gallery)
    out["scores_scaled"] = out["scores"] * matching.temperature.exp()
    out["matching_loss_unscaled"] = nn.functional.cross_entropy(out["scores"], torch.arange(len(out["scores"])))
    out["matching_loss"] = matching.contrastive_loss(out["scores"])
    out["loss"] = out["matching_loss"] + out["mil_loss"]
    return out


def assert_equal(name: str, tensor: torch.Tensor, case: dict) -> None:
    """Relative to the array's largest entry; drawn entries, norm and sum where it was too large to be kept."""
    expected = np.asarray(case["values"][f"out/{name}"], dtype=np.float64)
    actual = tensor.detach().double().numpy()
    shape = case["values"].get(f"shape/{name}")
    if shape is None:
        assert actual.shape == expected.shape, f"{name} has shape {actual.shape}, expected {expected.shape}"
        bound = TOLERANCE * max(np.abs(expected).max(), 1e-12)
    else:
        assert actual.shape == tuple(shape), f"{name} has shape {actual.shape}, expected {tuple(shape)}"
        flat = actual.reshape(-1)
        drawn = flat[np.random.RandomState(9).randint(0, flat.size, 256)]
        norm = np.linalg.norm(flat)
        actual = np.concatenate([drawn, [norm, flat.sum()]])
        bound = TOLERANCE * np.concatenate([np.full(256, np.abs(expected[:256]).max()), [norm, norm]])
    assert (np.abs(actual - expected) <= bound).all(), f"{name} differs by {np.abs(actual - expected).max():.3g}"


@pytest.mark.parametrize("batch", ["main", "edge"])
def test_every_intermediate_result(model: Released, case: dict, batch: str) -> None:
    with torch.no_grad():
        out = run(model, case, batch)
    names = [key.removeprefix(f"out/{batch}/") for key in case["values"] if key.startswith(f"out/{batch}/")]
    assert sorted(names) == sorted(out)
    failures = []
    for name in names:
        try:
            assert_equal(f"{batch}/{name}", out[name], case)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def test_gradients(model: Released, case: dict) -> None:
    model.zero_grad()
    run(model, case, "main")["loss"].backward()
    parameters, failures = dict(model.named_parameters()), []
    for name, norm, sample in zip(
        case["values"]["grad/keys"], case["values"]["grad/norm"], case["values"]["grad/sample4"], strict=True
    ):
        new = renamed(str(name))
        if new is None:
            assert np.isnan(norm), f"{name} takes part in the released code"
            continue
        gradient = parameters[new].grad.reshape(-1).numpy()
        drawn = gradient[np.random.RandomState(5).randint(0, gradient.size, 4)]
        # A bias under a softmax has gradient 0: what was recorded there is rounding.
        difference = max(abs(np.linalg.norm(gradient) - norm), np.abs(drawn - sample).max())
        if difference > TOLERANCE * norm + 1e-13:
            failures.append(f"{name}: differs by {difference:.3g} of {norm:.3g}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("form", ["single", "batch"])
def test_released_search(model: Released, case: dict, form: str) -> None:
    """Search as released: each query with its own concepts, unpadded, and every word counted as valid.

    "single" encodes a text alone; in "batch" the texts are padded together, so that padding (zeros) is attended too.
    """
    values, alignment, matching = case["values"], model.alignment, model.matching
    text, lengths, nouns, counts = (
        torch.from_numpy(values[f"in/main/{key}"]) for key in ("txt", "txt_len", "nouns", "nouns_len")
    )
    with torch.no_grad():
        images = np.concatenate([values["in/main/img_src"], values["in/main/img_trg"], values["in/extra_gallery"]])
        encoded = alignment.encode(model.image(torch.from_numpy(images).double()))
        for name, key in (("token", "tokens"), ("fg", "fg"), ("bg", "bg")):
            assert_equal(f"infer/gallery_{name}", encoded[key], case)
        gallery = matching.gallery(encoded["fg"], encoded["bg"])
        padded_sentences, padded_words, _ = model.text(text, lengths)
        rows = []
        for i in range(len(text)):
            one = slice(i, i + 1)
            sentence, words = padded_sentences[one], padded_words[one]
            if form == "single":
                sentence, words, _ = model.text(text[one, : lengths[i]], lengths[one])
            concepts = alignment.classifier.project(model.txt_enc["embed"](nouns[one, : counts[i]]))
            fused = model.fusion(
                reference_tokens=encoded["tokens"][one],
                reference_fg=encoded["fg"][one],
                concepts=concepts,
                concept_mask=torch.ones(concepts.shape[:2], dtype=torch.bool),
                words=words,
                word_mask=None,
                sentence=sentence,
            )["fused"]
            rows.append(matching.score(matching.query(fused, sentence, encoded["bg"][one]), gallery))
    assert_equal(f"infer/infer_scores_{form}", torch.cat(rows), case)
