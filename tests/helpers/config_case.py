"""A small config, and how it becomes a file."""

import yaml


def minimal() -> dict:
    return {
        "model": {"arch": "neucore", "model_type": "embedded"},
        "datasets": {"emoji": {}},
        "run": {"task": "composed_image_retrieval", "runner": "runner_cir", "max_epoch": 1, "valid_splits": ["val"]},
    }


def write(folder, content) -> str:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)
