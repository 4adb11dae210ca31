"""What each address of the service answers, and what it refuses."""

import io
import os
import random
import threading

import pytest
from colour_model import NAMES, draw
from PIL import Image
from serve_case import found, picture, refused

from neucore_plugin.serve.guard import Access, Limits

# ---- searching -------------------------------------------------------------------------------------------------------


def test_an_upload_and_a_text_find_what_the_index_itself_finds(client, index):
    hits = index.search(picture("red"), "green", k=3)
    answer = client.post("/search", files={"images": ("r.png", picture("red"))}, data={"text": "green", "k": "3"})
    assert found(answer) == [hit.name for hit in hits]
    first = answer.json()["results"][0]
    assert first["rank"] == 1 and first["score"] == pytest.approx(hits[0].score, abs=1e-6)
    assert index.name(first["id"]) == first["name"]
    assert str(index.root) not in answer.text  # where files lie is nobody's business


def test_names_and_ids_of_the_index_are_references_in_json(client, index):
    by_name = client.post("/search", json={"images": ["red.png"], "text": "green", "k": 2})
    assert found(by_name) == [hit.name for hit in index.search("red.png", "green", k=2)]
    assert "red.png" not in found(by_name)
    by_id = client.post("/search", json={"images": [index.position("red.png")], "text": "green", "k": 2})
    assert by_id.json()["results"] == by_name.json()["results"]


def test_text_alone_image_alone_and_similar(client):
    assert found(client.post("/search", json={"text": "blue", "k": 1})) == ["blue.png"]
    assert found(client.post("/search", json={"images": ["red.png"], "k": 1})) == ["more/deep/pink.webp"]
    assert found(client.get("/similar", params={"id": NAMES.index("red.png"), "k": 1})) == ["more/deep/pink.webp"]


def test_k_beyond_the_gallery_gives_all_but_the_reference(client):
    answer = client.post("/search", json={"images": ["red.png"], "k": 1000})
    assert sorted(found(answer)) == sorted(set(NAMES) - {"red.png"})


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 422, "nothing to search with"),
        ({"text": "  "}, 422, "nothing to search with"),
        ({"text": "red", "k": 0}, 422, "k: input should be greater than or equal to 1, given 0"),
        ({"text": "red", "k": True}, 422, "k: input should be a valid integer"),
        ({"text": 5}, 422, "text: input should be a valid string, given 5"),
        ({"text": "r" * 2001}, 422, "text: string should have at most 2000 characters"),
        ({"txt": "red"}, 422, "'txt' is not known. Did you mean 'text'?"),
        ({"images": ["no.png"]}, 404, "no image 'no.png' in the index"),
        ({"images": [99]}, 404, "no image of id 99 in the index (5 images)"),
        ({"images": [-1]}, 422, "images: a picture of the index is its name (a text) or its id"),
        ({"images": [True]}, 422, "images: a picture of the index is"),
        ({"images": ["../../etc/passwd"]}, 404, "no image '../../etc/passwd'"),
        ({"images": ["/etc/hostname"]}, 404, "no image '/etc/hostname'"),
        ({"images": "red.png"}, 422, "images: input should be a valid list"),
        ([1], 422, "the body: input should be"),
    ],
)
def test_a_wrong_query_is_told_in_one_sentence(client, body, status, told):
    assert told in refused(client.post("/search", json=body), status)


def test_an_existing_file_outside_the_index_is_no_reference(client, tmp_path):
    outside = draw(tmp_path / "outside.png", "red")
    refused(client.post("/search", json={"images": [str(outside)]}), 404)
    refused(client.post("/maps", json={"images": ["red.png"], "text": "red", "result": str(outside)}), 404)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes"),
        (b"no picture", "is no image that Pillow can read"),
        (picture("red", (64, 64))[:90], "truncated or damaged"),
        (picture("red", (2000, 1000)), "2,000,000 pixels, the limit is 1,000,000"),
    ],
)
def test_what_is_no_picture_is_told_in_one_sentence(serving, data, told):
    client = serving(limits=Limits(max_pixels=1_000_000))
    assert told in refused(client.post("/search", files={"images": ("r.png", data)}), 422)
    assert found(client.post("/search", json={"text": "blue", "k": 1})) == ["blue.png"]


def test_a_body_that_is_too_long_is_refused_whether_it_says_so_or_not(serving):
    client = serving(limits=Limits(body_bytes=1 << 20))
    assert "1 MB" in refused(client.post("/search", files={"images": ("r.png", bytes(2 << 20))}), 413)

    def pieces():
        for _ in range(40):
            yield bytes(1 << 16)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "1 MB" in refused(client.post("/search", content=pieces(), headers=headers), 413)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"text": "red", "text": "red"}', "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"text=red", "application/x-www-form-urlencoded", 415),
        (b"red", "text/plain", 415),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422),
        (b"broken", "multipart/form-data; boundary=x", 400),
        (b"text", "multipart/form-data", 400),
    ],
)
def test_a_damaged_body_is_told_in_one_sentence(client, content, kind, status):
    refused(client.post("/search", content=content, headers={"Content-Type": kind}), status)


def test_a_file_in_a_field_that_takes_none_is_refused(client):
    files = {"image": ("r.png", picture("red"))}
    assert "'image' takes no file. Did you mean 'images'?" in refused(client.post("/search", files=files), 422)


def test_random_bodies_are_answered_and_the_service_stays(client):
    """Bytes, and damaged forms and JSON: never a 500."""
    chance = random.Random(0)
    kinds = ("application/json", "multipart/form-data; boundary=x", "text/plain")
    good = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="r.png"\r\n\r\n'
        + picture("red")
        + b"\r\n--x--\r\n"
    )
    for number in range(300):
        body = bytearray(chance.choice((good, b'{"text": "red", "k": 3, "images": [1]}', chance.randbytes(50))))
        for _ in range(chance.randrange(4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        address = chance.choice(("/search", "/maps", "/feedback", "/login"))
        answer = client.post(address, content=bytes(body), headers={"Content-Type": kinds[number % 3]})
        assert answer.status_code < 500 and (answer.status_code < 300 or refused(answer, answer.status_code)), body
    assert found(client.post("/search", json={"text": "blue", "k": 1})) == ["blue.png"]


def test_a_failure_of_the_model_is_a_500_with_a_sentence_and_the_next_query_works(client, index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(index.model, "score", lambda *_: 1 / 0)
        assert "failed" in refused(client.post("/search", json={"text": "blue"}), 500)
    assert found(client.post("/search", json={"text": "blue", "k": 1})) == ["blue.png"]


def test_names_that_are_no_utf8_and_script_come_back_as_they_are(serving, tmp_path):
    from serve_case import MappedColours

    from neucore_plugin.retrieval import GalleryIndex

    names = ["<img src=x onerror=alert(1)>.png", "half \udcff.png"]
    files = {name: draw(tmp_path / f"{number}.png", "red") for number, name in enumerate(names)}
    client = serving(index=GalleryIndex.build(MappedColours(), files, progress=False))
    answer = client.post("/search", json={"text": "red"})
    assert sorted(found(answer)) == sorted(names)
    assert answer.headers["x-content-type-options"] == "nosniff"
    other = client.post(
        "/search", content=b'{"images": ["half \\udcff.png"]}', headers={"Content-Type": "application/json"}
    )
    assert found(other) == names[:1]


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_queries_that_wait_are_encoded_together_and_answered_as_alone(serving, index, monkeypatch):
    client, texts = serving(), ["red", "green", "blue", "grey", "red green", "pink"]
    alone = [client.post("/search", json={"text": text}).json()["results"] for text in texts]
    began, go, sizes = threading.Event(), threading.Event(), []
    encode = index.model.encode_query

    def slow(pixels, said):
        sizes.append(len(said))
        began.set()
        go.wait(10)
        return encode(pixels, said)

    monkeypatch.setattr(index.model, "encode_query", slow)
    answers = {}

    def ask(text):
        answers[text] = client.post("/search", json={"text": text}).json()["results"]

    first = threading.Thread(target=ask, args=(texts[0],))
    first.start()
    assert began.wait(10)
    others = [threading.Thread(target=ask, args=(text,)) for text in texts[1:]]
    for thread in others:
        thread.start()
    while client.get("/metrics").text.find("neucore_waiting 5.0") < 0:
        pass
    go.set()
    for thread in (first, *others):
        thread.join(10)
    assert sizes == [1, 5]
    assert [answers[text] for text in texts] == alone


def test_one_bad_query_of_a_batch_spoils_no_other(index):
    from neucore_plugin.serve.worker import Worker

    go = threading.Event()
    worker = Worker(10, 10)
    blocked = worker.submit(lambda items: [go.wait(10)], 0)

    def handler(items):
        return [10 // item for item in items]

    answers = [worker.submit(handler, item) for item in (1, 0, 5)]
    go.set()
    assert blocked.result(10) and answers[0].result(10) == 10 and answers[2].result(10) == 2
    with pytest.raises(ZeroDivisionError):
        answers[1].result(10)
    worker.close()


def test_beyond_the_bound_comes_503_with_retry_after_and_the_others_are_answered(serving, index, monkeypatch):
    client, go, encode = serving(limits=Limits(waiting=2)), threading.Event(), index.model.encode_query
    monkeypatch.setattr(index.model, "encode_query", lambda *given: go.wait(10) and encode(*given))
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/search", json={"text": "blue", "k": 1})))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    while len(answers) < 4:
        pass
    go.set()
    for thread in threads:
        thread.join(10)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert "try again" in refused(busy, 503) and busy.headers["retry-after"] == "1"


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_come_encoded_anew_within_their_bounds_and_once(serving, index, folder):
    draw(folder / "large.png", "red", (3000, 1500))
    index.add([folder / "large.png"], progress=False)
    client, place = serving(), index.position("large.png")
    for address, size in (("thumbnails", (320, 160)), ("images", (2048, 1024))):
        answer = client.get(f"/{address}/{place}")
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == size
        again = client.get(f"/{address}/{place}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_a_photograph_leaves_without_what_its_file_says(serving, index, folder):
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    noise = Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000))
    noise.save(folder / "photo.jpg", exif=exif)
    index.add([folder / "photo.jpg"], progress=False)
    answer = serving().get(f"/images/{index.position('photo.jpg')}")
    assert answer.headers["content-type"] == "image/jpeg" and b"secret" not in answer.content


@pytest.mark.parametrize("id", ["99", "-1", "x", "..%2f..%2fetc%2fpasswd", "1.5", "9" * 30])
def test_an_id_that_is_none_shows_nothing(client, id):
    for address in ("images", "thumbnails"):
        answer = client.get(f"/{address}/{id}")
        assert answer.status_code in (404, 422) and refused(answer, answer.status_code)


def test_a_file_put_in_the_place_of_a_picture_is_not_shown(client, index, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    place, path = index.position("red.png"), index.path(index.position("red.png"))
    os.remove(path)
    assert "cannot be read any more" in refused(client.get(f"/images/{place}"), 410)
    os.symlink(secret, path)
    told = refused(client.get(f"/images/{place}"), 410)
    assert "'red.png' of the index" in told and str(tmp_path) not in told
    refused(client.post("/search", json={"images": ["red.png"]}), 410)


# ---- maps ------------------------------------------------------------------------------------------------------------


def test_maps_lie_over_reference_and_result(client):
    body = {"text": "green with blue", "result": "blue.png"}
    for answer in (
        client.post("/maps", json={"images": ["red.png"], **body}),
        client.post("/maps", files={"images": ("r.png", picture("red"))}, data=body),
    ):
        maps = answer.json()["maps"]
        assert [entry["concept"] for entry in maps] == ["green", "blue"]
        assert maps[0]["reference"].startswith("data:image/") and maps[0]["reference"] != maps[0]["result"]
    assert "one reference picture" in refused(client.post("/maps", json=body), 422)
    assert client.post("/maps", json={"images": [0], **body, "text": "else"}).json() == {"maps": []}


def test_a_model_without_maps_has_none(serving, folder):
    from colour_model import ColourModel

    from neucore_plugin.retrieval import GalleryIndex

    client = serving(index=GalleryIndex.build(ColourModel(), folder, progress=False))
    assert client.get("/health").json()["maps"] is False
    assert client.post("/maps", json={"images": [0], "text": "red", "result": 1}).json() == {"maps": []}


# ---- what is told of the service -------------------------------------------------------------------------------------


def test_health_says_what_is_served(client, index):
    about = client.get("/health").json()
    assert about["status"] == "ok" and about["images"] == 5 and about["model"] == "colours-1" and not about["feedback"]


def test_metrics_count_requests_by_address_and_not_by_what_is_asked(client):
    for address in ("/thumbnails/1", "/thumbnails/2", "/nowhere/1", "/nowhere/2"):
        client.get(address)
    text = client.get("/metrics").text
    assert 'neucore_requests_total{path="/thumbnails/{id}",status="200"} 2.0' in text
    assert 'neucore_requests_total{path="other",status="404"} 2.0' in text and "nowhere" not in text
    assert "neucore_index_images 5.0" in text


def test_docs_list_every_address_without_a_script_or_a_foreign_one(client):
    text = client.get("/docs").text
    for address in (
        "/search",
        "/similar",
        "/maps",
        "/feedback",
        "/health",
        "/metrics",
        "/thumbnails/{id}",
        "/images/{id}",
    ):
        assert address in text
    assert "<script" not in text and "https://" not in text
    assert client.get("/openapi.json").json()["paths"]["/search"]["post"]["requestBody"]["content"].keys() == {
        "application/json",
        "multipart/form-data",
    }


def test_unknown_addresses_and_methods_are_told_in_one_sentence(client):
    assert "/docs lists all" in refused(client.get("/nothing"), 404)
    assert "DELETE is not taken here" in refused(client.delete("/search"), 405)
    assert "id: " in refused(client.get("/similar"), 422)


# ---- who may ask -----------------------------------------------------------------------------------------------------

TOKEN = "a-token-of-sixteen-letters"


def test_a_token_is_wanted_for_everything_but_the_page_itself(serving):
    client = serving(access=Access(token=TOKEN))
    for address in (
        "/search",
        "/similar?id=1",
        "/images/1",
        "/thumbnails/1",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/feedback",
    ):
        assert "Bearer" in refused(client.get(address), 401)
    for given in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"):
        refused(client.get("/similar?id=1", headers={"Authorization": given.encode()}), 401)
    assert client.get("/").status_code == 200
    assert client.get("/health").json() == {"status": "ok", "version": "unknown", "login": True}
    assert client.get("/similar?id=1", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_the_page_gets_a_cookie_for_the_token_which_is_not_the_token(serving):
    client = serving(access=Access(token=TOKEN))
    refused(client.post("/login", json={"token": "wrong"}), 401)
    refused(client.get("/thumbnails/1", headers={"Cookie": f"neucore_session={TOKEN}"}), 401)
    answer = client.post("/login", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 204 and "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert client.get("/thumbnails/1").status_code == 200
    other = serving(access=Access(token=TOKEN))  # of another start
    refused(other.get("/thumbnails/1", headers={"Cookie": cookie.partition(";")[0]}), 401)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "evil.example:8000", "[", "a b"])
def test_a_name_that_is_not_the_services_is_not_answered(client, host):
    assert "does not answer to the name" in refused(client.get("/health", headers={"Host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "search.example"])
def test_own_names_and_addresses_in_numbers_are_answered(serving, host):
    client = serving(access=Access(hosts=("localhost", "search.example")))
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9000"},
        {"Origin": "http://localhost:8000.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_may_ask_for_nothing(client, headers):
    for answer in (
        client.post("/search", json={"text": "red"}, headers=headers),
        client.get("/similar?id=1", headers=headers),
    ):
        assert "another site" in refused(answer, 403)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_own_page_may_ask_and_be_linked_to(client):
    own = {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/search", json={"text": "red"}, headers=own).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_the_page_allows_itself_nothing_but_its_own_script_style_and_service(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert "src=" not in answer.text and 'href="http' not in answer.text
