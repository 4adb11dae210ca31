"""How a model bears other wordings of a query, and pictures near the reference that lack what was asked for."""

from typing import Any

from neucore_plugin.evaluation.metrics import recall_at
from neucore_plugin.evaluation.ranking import Evaluated
from neucore_plugin.evaluation.significance import spread

AMONG = 5  # images, best first, that should hold no near-twin


def robustness(found: Evaluated) -> dict[str, dict[str, Any]]:
    """Percent, of the model's own row of a split; what its queries do not offer is left out.

    wordings: "R@1" as asked and in each further wording, the "spread" of these (their standard deviation), and
    "changed": queries whose image at rank 1 is another one in any further wording.
    near_twins: "among_5": of the "queries" that have near-twins, those with one among the first 5 images, the reference
    left out as the protocol says; "ahead": those with one among them and ahead of every right answer.
    """
    own, dataset = found.rows[found.title], found.dataset
    told: dict[str, dict[str, Any]] = {}
    if found.wordings:
        recalls = [recall_at([query.rank for query in row], [1])["R@1"] for row in (own, *found.wordings)]
        firsts = [{query.top[:1] for query in asked} for asked in zip(own, *found.wordings, strict=True)]
        changed = 100.0 * sum(len(images) > 1 for images in firsts) / len(own)
        told["wordings"] = {"R@1": recalls, "spread": spread(recalls), "changed": changed, "queries": len(own)}
    twins = [dataset.near_twin_positions(index) for index in range(len(own))]
    held, ahead = [], []
    for places, query in zip(twins, own, strict=True):
        if places:
            best = min((n for n, place in enumerate(query.top[:AMONG], start=1) if place in places), default=None)
            held.append(best is not None)
            ahead.append(best is not None and best < query.rank)
    if held:
        shares = {f"among_{AMONG}": held, "ahead": ahead}
        told["near_twins"] = {name: 100.0 * sum(one) / len(held) for name, one in shares.items()}
        told["near_twins"]["queries"] = len(held)
    return told
