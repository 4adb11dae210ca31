"""Word vectors from a file: GloVe's text form, or a `.npy` matrix with a list of its words."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import expanded, open_array, read_text


def read_word_vectors(path: str | Path, words: str | Path | None, rows: Mapping[str, int], into: Tensor) -> None:
    """Fill the rows [V,Dw] of `into` whose words the file holds. Raises DataError, also where it holds none.

    Args:
        path: a text file with `word number number ...` a line, or a `.npy` matrix. A word may hold blanks.
        words: for a `.npy`: its words, one a line; by default the `.txt` beside it.
    """
    path = expanded(path)
    if not path.is_file():
        raise DataError(
            f"no word vectors at {path} (model.backbone.text.glove); give a GloVe text file, such as "
            "glove.840B.300d.txt of the Stanford NLP group, or a .npy matrix; null means random vectors"
        )
    found = _matrix(path, words, rows, into) if path.suffix == ".npy" else _text(path, rows, into)
    if not found:
        raise DataError(f"{path} holds a vector of none of the {len(rows)} words; is it a file of word vectors?")


def _text(path: Path, rows: Mapping[str, int], into: Tensor) -> int:
    width, found = into.shape[1], 0
    beginnings = {word.split(" ")[0] for word in rows}
    with (
        open(path, encoding="utf-8-sig", errors="replace", newline="\n") as stream,
        tqdm(total=path.stat().st_size, desc="word vectors", unit="B", unit_scale=True, leave=False) as bar,
    ):
        for number, line in enumerate(stream, 1):
            bar.update(len(line))
            if number > 1 and line.partition(" ")[0] not in beginnings:
                continue  # splitting all lines takes minutes
            if number == 1 and len(line.split()) == 2:
                continue  # word2vec's header: number of words, width
            word, *values = line.rsplit(None, width) or [""]
            more = word.split()[1:] if number == 1 else []
            if len(values) < width or (more and all(map(_is_number, more))):
                raise DataError(
                    f"{path}, line {number}: {len(values) + len(more)} numbers, expected {width} "
                    "(model.backbone.text.word_dim); the file is of another width, or damaged"
                )
            row = rows.get(word)
            if number > 1 and row is None:
                continue
            try:
                vector = torch.tensor([float(value) for value in values])
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}; the file is damaged") from error
            if row is not None:
                into[row] = _finite(vector, path, word)
                found += 1
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _matrix(path: Path, words: str | Path | None, rows: Mapping[str, int], into: Tensor) -> int:
    names = expanded(words) if words is not None else path.with_suffix(".txt")
    if not names.is_file():
        raise DataError(f"{path} needs the list of its words, one a line: no file {names}; give it as glove_words")
    listed = read_text(names).removesuffix("\n").split("\n")
    matrix = open_array(path)
    if matrix.shape != (len(listed), into.shape[1]) or matrix.dtype.kind != "f":
        raise DataError(
            f"{path} is {matrix.dtype} {list(matrix.shape)}, expected floats [{len(listed)}, {into.shape[1]}]: a row "
            f"for each word of {names}, model.backbone.text.word_dim columns"
        )
    found = 0
    for place, word in enumerate(listed):
        if (row := rows.get(word.strip())) is not None:
            into[row] = _finite(torch.from_numpy(np.array(matrix[place], dtype=np.float32)), path, word)
            found += 1
    return found


def _finite(vector: Tensor, path: Path, word: str) -> Tensor:
    if not torch.isfinite(vector).all():
        raise DataError(f"{path}: the vector of {word!r} holds NaN or infinity; the file is damaged")
    return vector
