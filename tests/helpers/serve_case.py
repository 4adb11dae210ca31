"""A model, pictures and answers for the tests of the service."""

import io
import json

import torch
from colour_model import COLOURS, ColourModel
from PIL import Image


class MappedColours(ColourModel):
    """Also says where a colour lies: everywhere in the result, nowhere in the reference."""

    def concept_maps(self, pixels, texts, candidates):
        return [
            [
                {"concept": word, "reference": torch.zeros(2, 2), "candidate": torch.ones(2, 2)}
                for word in text.split()
                if word in COLOURS
            ]
            for text in texts
        ]


def picture(colour, size=(8, 8), kind="PNG"):
    """The bytes of a picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, COLOURS.get(colour, colour)).save(stream, kind)
    return stream.getvalue()


def found(answer):
    """Names of the results, best first."""
    assert answer.status_code == 200, answer.text
    return [hit["name"] for hit in answer.json()["results"]]


def refused(answer, status):
    """The one sentence of an error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    content = json.loads(answer.content)
    assert set(content) == {"error"} and content["error"] and "\n" not in content["error"]
    return content["error"]
