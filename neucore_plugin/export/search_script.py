"""python search.py PICTURES --image ONE.jpg --text "the same but red" -k 10: onnxruntime, numpy, tokenizers, Pillow."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
RULES = json.loads((HERE / "search.json").read_text(encoding="utf-8"))
PIECES = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
IMAGE, QUERY = (onnxruntime.InferenceSession(HERE / f"{side}.onnx") for side in ("image", "query"))

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", type=Path)
parser.add_argument("--image", type=Path)
parser.add_argument("--text", default="")
parser.add_argument("-k", type=int, default=10)
asked = parser.parse_args()


def pixels(path):  # [1,S,S,3] bytes: upright, on white, made square
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side, longest = RULES["side"], max(image.size)
    full = [max(1, round(edge * side / longest)) if RULES["fit"] == "pad" else side for edge in image.size]
    page = Image.new("RGB", (side, side), "white")
    resized = image.resize(full, Image.Resampling[RULES["interpolation"]])
    page.paste(resized, [(side - edge) // 2 for edge in full])
    return np.asarray(page)[None]


def numbers(texts):  # [texts, longest] numbers of word pieces
    return np.array([line.ids for line in PIECES.encode_batch(texts)], dtype=np.int64)


def asks(text):  # whether it has a word that asks for something
    return any(word not in RULES["still"] for word in re.findall(r"\w+", text.lower()))


def run(graph, given):  # of `given` what the graph reads -> {output: array}
    found = graph.run(None, {wanted.name: given[wanted.name] for wanted in graph.get_inputs()})
    return {output.name: array for output, array in zip(graph.get_outputs(), found, strict=True)}


paths = [path for path in asked.pictures.rglob("[!.]*") if path.suffix.lower() in Image.registered_extensions()]
names = sorted(path.relative_to(asked.pictures).as_posix() for path in paths)
if not names:
    parser.error(f"no pictures in {asked.pictures}")
rows = [run(IMAGE, {"pixels": pixels(asked.pictures / name)}) for name in names]
gallery = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}

parts = [asked.text]
if "clauses" in RULES:  # the model reads each clause of the caption by itself
    text = PIECES.normalizer.normalize_str(asked.text).strip()
    first, *rest = re.split("(" + RULES["between"] + ")", text)
    parts = [first]
    for mark, part in zip(rest[::2], rest[1::2], strict=True):
        if len(parts) < RULES["clauses"] and asks(parts[-1]) and asks(part):
            parts.append(part)
        else:
            parts[-1] += mark + part
    parts = [part for part in (one.strip(" ,;") for one in parts) if part] or [text]
    parts += [""] * (RULES["clauses"] - len(parts))
given = {"has_image": np.array([asked.image is not None]), "pieces": numbers(parts)}
if "clauses" in RULES:
    given["pieces"] = given["pieces"][None]
given["pixels"] = pixels(asked.image) if asked.image else np.zeros((1, RULES["side"], RULES["side"], 3), np.uint8)
forms, words = RULES.get("forms", {}), re.findall(r"[^\W\d_]+", PIECES.normalizer.normalize_str(asked.text))
concepts = dict.fromkeys(forms[word] for word in words if word in forms)  # in order, each once
given["concepts"] = numbers(list(concepts) or [""])[None]
query = run(QUERY, given)

scores = query["cosines"][0] @ gallery["cosines"].T if "cosines" in query else np.zeros(len(names))
if "weighted" in query:
    upper, lower = (query[key][0] @ gallery[key].T for key in ("weighted", "squares"))
    scores = scores + (upper / np.sqrt(np.maximum(lower, 1e-24))).sum(axis=0)
if "change" in query:
    moved, away = (query[name][0] @ gallery["units"].T for name in ("change", "origin"))
    there = query["change"][0] @ query["origin"][0]
    scores = scores + (moved - there) / np.sqrt(2.001 - 2 * away)
order = np.argsort(-scores, kind="stable")
others = [n for n in order if not (asked.image and asked.image.samefile(asked.pictures / names[n]))]
for rank, n in enumerate(others[: asked.k], start=1):
    print(f"{rank:3d}  {scores[n]:8.4f}  {names[n]}")
