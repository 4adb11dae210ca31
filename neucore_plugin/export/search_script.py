"""python search.py PICTURES --image ONE.jpg --text "the same but red" -k 10: onnxruntime, numpy, tokenizers, Pillow."""

import argparse
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
RULES = json.loads((HERE / "search.json").read_text(encoding="utf-8"))
PIECES = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))


def pixels(path):  # [1,S,S,3] bytes: upright, on white, made square
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side, longest = RULES["image_size"], max(image.size)
    full = [max(1, round(edge * side / longest)) if RULES["fit"] == "pad" else side for edge in image.size]
    page = Image.new("RGB", (side, side), "white")
    resized = image.resize(full, Image.Resampling[RULES["interpolation"].upper()])
    page.paste(resized, ((side - full[0]) // 2, (side - full[1]) // 2))
    return np.asarray(page)[None]


def concepts(text):  # lemmas: the tagger's, as in training; without spaCy those that the table of forms knows
    try:
        import spacy

        name = next(filter(spacy.util.is_package, RULES["pipelines"]))
        tokens = spacy.load(name, exclude=RULES["unused"])(text.replace("<and>", "and"))
        chosen = [t for t in tokens if t.pos_ in RULES["tags"] and any(map(str.isalpha, t.text))]
        found = [(token.lemma_ or token.text).lower().strip() for token in chosen]
    except (ImportError, StopIteration):
        found = [RULES["forms"].get(word) for word in re.findall(r"[^\W\d_]+", text.lower())]
    return [word for word in dict.fromkeys(found) if word and word not in RULES["stop"]]


def numbers(texts, specials=True):  # [texts, longest] numbers of word pieces, -1 where there is none
    rows = [PIECES.encode(text, add_special_tokens=specials).ids for text in texts] or [[]]
    return np.array([row + [-1] * (max(3, *map(len, rows), 0) - len(row)) for row in rows], dtype=np.int64)


def run(graph, batches):
    side = onnxruntime.InferenceSession(HERE / graph)
    found = zip(*(side.run(None, given) for given in batches), strict=True)
    return {out.name: np.concatenate(parts) for out, parts in zip(side.get_outputs(), found, strict=True)}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", type=Path)
parser.add_argument("--image", type=Path)
parser.add_argument("--text", default="")
parser.add_argument("-k", type=int, default=10)
asked = parser.parse_args()
paths = [path for path in asked.pictures.rglob("[!.]*") if path.suffix.lower() in Image.registered_extensions()]
names = sorted(path.relative_to(asked.pictures).as_posix() for path in paths)
gallery = run("image.onnx", ({"pixels": pixels(asked.pictures / name)} for name in names))

spaced = [" " if unicodedata.category(c)[0] == "C" else c for c in unicodedata.normalize("NFKC", asked.text)]
text, blank = " ".join("".join(spaced).split()), np.zeros((1, *[RULES["image_size"]] * 2, 3), np.uint8)
given = {"has_image": np.array([asked.image is not None]), "pixels": pixels(asked.image) if asked.image else blank}
given |= {"pieces": numbers([text]), "concepts": numbers(concepts(text), RULES["specials"])[None]}
query = run("query.onnx", [{name: given[name] for name in RULES["inputs"]}])

scores = (query["cosines"] @ gallery["cosines"].T if "cosines" in query else np.zeros((1, len(names))))[0]
if "weighted" in query:
    upper, lower = (query[name][0] @ gallery[name].T for name in ("weighted", "squares"))
    scores = scores + (upper / np.sqrt(np.maximum(lower, 1e-24))).sum(axis=0)
order = np.argsort(-scores, kind="stable")
others = [place for place in order if not asked.image or not asked.image.samefile(asked.pictures / names[place])]
for rank, place in enumerate(others[: asked.k], start=1):
    print(f"{rank:3d}  {scores[place]:8.4f}  {names[place]}")
