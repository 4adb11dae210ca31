"""Votes become a folder that `datasets: folder` trains from; nothing that was kept is lost."""

import io
import json
import threading

import pytest
from PIL import Image
from serve_case import picture, refused

from neucore_plugin.datasets import folder as folder_data
from neucore_plugin.serve.feedback import Feedback


@pytest.fixture
def votes(tmp_path):
    return tmp_path / "votes"


@pytest.fixture
def client(serving, votes):
    return serving(feedback=Feedback(votes))


def vote(client, result, good=True, text="in blue", upload=None):
    body = {"text": text, "result": result, "good": good}
    if upload is None:
        answer = client.post("/feedback", json={**body, "images": ["red.png"]})
    else:
        data = {**body, "good": str(good).lower()}
        answer = client.post("/feedback", files={"images": ("../../evil.png", upload)}, data=data)
    assert answer.status_code == 201, answer.text
    return answer.json()["kept"]


def test_votes_are_triplets_that_the_folder_data_set_reads(client, votes, folder):
    kept = vote(client, "blue.png")
    uploaded = vote(client, "green.png", text="in green", upload=picture("red", (9, 9), "JPEG"))
    assert uploaded["reference"].endswith(".jpg") and "evil" not in uploaded["reference"]
    exported = client.get("/feedback")
    assert exported.json() == json.loads((votes / "train.json").read_text())
    triplets, gallery = folder_data.load_split(votes, "train", folder_data.images(votes))
    assert [(t.reference, t.caption, t.targets) for t in triplets] == [
        (kept["reference"], "in blue", (kept["target"],)),
        (uploaded["reference"], "in green", (uploaded["target"],)),
    ]
    assert kept["target"].endswith(".png") and kept["reference"].endswith(".png")
    assert (votes / "images" / kept["target"]).read_bytes() == (folder / "blue.png").read_bytes()
    assert len(gallery.ids) == 4
    with Image.open(io.BytesIO((votes / "images" / uploaded["reference"]).read_bytes())) as image:
        assert image.size == (9, 9)


def test_the_last_vote_on_a_result_counts_and_all_are_kept(client, votes):
    vote(client, "blue.png")
    vote(client, "green.png")
    vote(client, "blue.png", good=False)
    (triplet,) = client.get("/feedback").json()
    assert len(triplet["target"]) == 1
    vote(client, "green.png", good=False)
    assert client.get("/feedback").json() == []
    assert [entry["good"] for entry in Feedback(votes).votes()] == [True, True, False, False]


def test_a_line_that_a_kill_cut_loses_no_other(client, votes):
    vote(client, "blue.png")
    with open(votes / "votes.jsonl", "ab") as stream:
        stream.write(b'{"reference": "a')
    vote(client, "green.png")
    assert len(list(Feedback(votes).votes())) == 2
    assert len(client.get("/feedback").json()[0]["target"]) == 2


def test_a_full_drive_is_told_and_leaves_no_half_vote(client, votes, monkeypatch):
    import os

    vote(client, "blue.png")
    before = (votes / "votes.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    answer = client.post("/feedback", json={"images": ["red.png"], "text": "x", "result": "blue.png", "good": True})
    assert "free space" in refused(answer, 422)
    assert (votes / "votes.jsonl").read_bytes() == before


def test_many_services_may_keep_votes_in_one_folder_at_once(votes):
    writers = [Feedback(votes) for _ in range(4)]

    def work(number):
        for turn in range(10):
            same = (picture("red"), ".png")
            writers[number].add({"caption": f"{number} {turn}", "good": True}, same, (picture("blue"), ".png"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((votes / "train.json").read_text())) == 40


def test_votes_that_mean_nothing_are_refused(client, serving):
    body = {"images": ["red.png"], "text": "x", "result": "blue.png", "good": True}
    assert "one reference picture" in refused(client.post("/feedback", json={**body, "images": []}), 422)
    assert "needs the caption" in refused(client.post("/feedback", json={**body, "text": " "}), 422)
    assert "is no image" in refused(
        client.post(
            "/feedback", files={"images": ("r.png", b"no")}, data={"text": "x", "result": "blue.png", "good": "true"}
        ),
        422,
    )
    assert client.get("/feedback").json() == []
    without = serving()
    assert "--feedback DIR" in refused(without.post("/feedback", json=body), 404)
