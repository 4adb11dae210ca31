"""Every quantity that a case of the released code's numbers may hold, from the parts of our model.

B batch, N image tokens, L words, K concepts of a query, C vocabulary, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.models.matching import Matching
from neucore_plugin.models.neucore import NeucoreModel

INPUTS = ("img_src", "img_trg", "txt", "txt_len", "nouns", "nouns_len", "mil_labels")


def inputs(case: Any, batch: str, model: NeucoreModel) -> dict[str, Tensor]:
    found = {key: torch.from_numpy(case.values[f"in/{batch}/{key}"]) for key in INPUTS}
    kind = model.absent_image.dtype
    return {key: value.to(kind) if value.is_floating_point() else value for key, value in found.items()}


def image_tokens(model: NeucoreModel, pixels: Tensor) -> Tensor:
    """Projected tokens [B,N,D] of pictures or feature maps."""
    return model.image_features(["tokens"], pixels)["tokens"]


def everything(model: NeucoreModel, case: Any, batch: str) -> dict[str, Tensor]:
    """Every quantity that `out/<batch>/` may hold, under its name there, from the parts of the model."""
    given, alignment, fusion, matching = inputs(case, batch, model), model.alignment, model.fusion, model.matching
    out = {f"img_tokens_{side}": image_tokens(model, given[f"img_{key}"]) for side, key in (("r", "src"), ("t", "trg"))}
    text = model.backbone.text.encode_ids(given["txt"], given["txt_len"])
    out["m"], out["word_feats"] = text["sentence"], text["words"]
    reference, target = alignment.encode(out["img_tokens_r"]), alignment.encode(out["img_tokens_t"])
    for side, encoding in (("r", reference), ("t", target)):
        out.update({f"{side}_token": encoding["tokens"], f"{side}_fg": encoding["fg"], f"{side}_bg": encoding["bg"]})
    out["rt_fg"], _ = alignment.pool_bag(reference, target)
    embed = model.backbone.text.embedding
    vocabulary = embed(torch.from_numpy(case.values["in/all_nouns_token"]))  # [C,Dw]
    out["cls_weights"] = alignment.classifier.project(vocabulary)
    out["cls_logits"] = alignment.classifier(out["rt_fg"], vocabulary)
    concept_mask = torch.arange(given["nouns"].shape[1])[None] < given["nouns_len"][:, None]
    concepts = alignment.classifier.project(embed(given["nouns"])) * concept_mask[..., None]
    out["concepts"] = concepts
    out["mil_loss"] = model.concept_loss(out["cls_logits"], given["mil_labels"]).mean()
    fused = fusion(
        reference["tokens"], reference["fg"], concepts, concept_mask, text["words"], text["mask"], text["sentence"]
    )
    out["query_att_feats"], out["query_att_weights"] = fused["entities"], fused["word_weights"]
    out["instr_logits"], out["instr_weights"] = fusion.instructions.mlp(out["m"]), fused["instruction_weights"]
    x = torch.cat([reference["fg"][:, None], reference["tokens"], concepts], dim=1)
    mask = torch.cat([concept_mask.new_ones(len(x), x.shape[1] - concepts.shape[1]), concept_mask], dim=1)
    out["executor_mask"] = mask
    for layer, executors in enumerate(fusion.executors):
        out["executor_in" if layer == 0 else f"executor_in_l{layer}"] = x
        results = []
        for kind, executor in enumerate(executors):
            entity = fused["entities"][:, kind]
            out[f"adain_params_l{layer}_t{kind}"] = executor.instantiate(entity).flatten(1)
            results.append(executor(x, entity, mask))
            out[f"executor_out_l{layer}_t{kind}"] = results[-1]
        x = sum(fused["instruction_weights"][:, layer, k, None, None] * result for k, result in enumerate(results))
    out["hat_t"] = fused["fused"]
    query = matching.query(out["hat_t"], out["m"], reference["bg"])
    gallery = matching.gallery(target["fg"], target["bg"])
    out["Tr_m"] = nn.functional.normalize(query["text"], dim=-1)  # recorded after its division by the norm
    out["A_EM"] = query["attention"]
    for key, term in (("program_scores", "fused"), ("EM_scores", "explicit"), ("IS_scores", "background")):
        one = Matching(dim=out["m"].shape[1], terms=[term], temperature=0.0, learn_temperature=False, released=True)
        out[key] = one.score(query, gallery)
    out["scores"] = matching.score(query, gallery)
    out["scores_scaled"] = out["scores"] * matching.factor()
    out["matching_loss_unscaled"] = nn.functional.cross_entropy(out["scores"], torch.arange(len(out["scores"])))
    out["matching_loss"] = model.matching_loss(out["scores"], matching.factor(), torch.arange(len(out["m"])), None)
    out["loss"] = out["matching_loss"] + out["mil_loss"]
    return out
