"""Word vectors from files: GloVe's text, a matrix, and what is neither."""

import numpy as np
import pytest
from encoder_case import encoder

from neucore_plugin.common.errors import DataError
from neucore_plugin.models.backbones.resnet_gru import word_list

WORDS = word_list(["red blue dress", "longer make it sleeve"])


def read(path, **settings):
    return encoder("text", "glove_bigru", words=WORDS, word_dim=5, width=8, glove=path, **settings)


def test_word_vectors_from_a_text_file_and_a_matrix(tmp_path):
    matrix = np.arange(15, dtype=np.float32).reshape(3, 5) / 7
    lines = [f"{word} {' '.join(str(v) for v in row)}" for word, row in zip(("red", "zoo", "it"), matrix, strict=True)]
    (tmp_path / "glove.txt").write_text("\n".join(lines) + "\n")
    np.save(tmp_path / "glove.npy", matrix)
    (tmp_path / "list").write_text("red\nzoo\nit\n")
    for glove, names in (("glove.txt", None), ("glove.npy", tmp_path / "list")):
        found = read(tmp_path / glove, glove_words=names)
        assert np.allclose(found.embed_words(["red", "it"]).detach(), matrix[[0, 2]])


def test_words_with_blanks(tmp_path):
    """GloVe's largest file holds some, and their first word may be one of ours."""
    lines = (", 9 9 9 9 9", "red name@domain.com 1 2 3 4 5", ". . . 1 1 1 1 1", "red 5 4 3 2 1", "it 7 1 1 1 1 1")
    (tmp_path / "glove.txt").write_text("\n".join(lines) + "\n")
    found = read(tmp_path / "glove.txt")
    assert found.embed_words(["red"]).tolist() == [[5, 4, 3, 2, 1]]


def test_word_vectors_that_cannot_be_used(tmp_path):
    def refused(name, content, match, **more):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=match):
            read(tmp_path / name, **more)

    refused("none.txt", None, "no word vectors at .*none.txt .*give a GloVe text file")
    refused("narrow.txt", "red 1 2 3\n", r"narrow.txt, line 1: 3 numbers, expected 5 \(model.backbone.text.word_dim\)")
    refused("wide.txt", "red 1 2 3 4 5 6 7\n", "wide.txt, line 1: 7 numbers, expected 5")
    refused("cut.txt", "zoo 1 2 3 4 5\nred 1 2\n", "cut.txt, line 2: 2 numbers")
    refused("nan.txt", "red 1 2 nan 4 5\n", "the vector of 'red' holds NaN")
    refused("other.txt", "zoo 1 2 3 4 5\n", "holds a vector of none of the 12 words")
    refused("word.txt", "red 1 2 x 4 5\n", "line 1: could not convert string to float: 'x'")
    np.save(tmp_path / "m.npy", np.zeros((2, 5)))
    refused("m.npy", None, "needs the list of its words, one a line: no file .*m.txt")
    (tmp_path / "m.txt").write_text("red\n")
    refused("m.npy", None, r"m.npy is float64 \[2, 5\], expected floats \[1, 5\]")
    np.save(tmp_path / "o.npy", np.array([object()], dtype=object), allow_pickle=True)
    (tmp_path / "o.txt").write_text("red\n")
    refused("o.npy", None, "o.npy is no .npy matrix of numbers")
    (tmp_path / "o.npy").write_bytes(b"PK\3\4" + bytes(99))  # the zip file that an .npz is
    refused("o.npy", None, "o.npy is no .npy matrix of numbers")
