"""A service over the colours of `colour_model`, whose scores are known in closed form."""

import pytest
from colour_model import make_folder
from serve_case import MappedColours

from neucore_plugin.retrieval import GalleryIndex


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pictures")


@pytest.fixture
def index(folder):
    return GalleryIndex.build(MappedColours(), folder, progress=False)


@pytest.fixture
def serving(index):
    """A client of a service, with what the test wants of it; its threads end with the test."""
    from starlette.testclient import TestClient

    from neucore_plugin.serve.app import create_app

    clients = []

    def serve(**changes):
        app = create_app(changes.pop("index", index), **changes)
        clients.append(TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False))
        return clients[-1].__enter__()

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serving):
    return serving()
