"""The page in a real Chromium, over a real service: the whole path, by mouse and by keys alone, for every reader.

Skipped, with the reason, where Playwright or Chromium is absent; the accessibility check where npm cannot get axe-core.
"""

import json
import shutil
import subprocess
import tarfile

import pytest
from colour_model import make_folder
from serve_case import MappedColours, picture
from serve_process import serving

from neucore_plugin.retrieval import GalleryIndex

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (chromium, chromium-browser, google-chrome) on PATH"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    GalleryIndex.build(MappedColours(), make_folder(folder / "pictures"), progress=False).save(folder / "index")
    with serving(folder / "index", "--feedback", str(folder / "votes")) as (url, _):
        yield url, folder / "votes"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, service):
    """A page of the service; at its end: nothing on the console, no request to another host."""
    said, asked, contexts = [], [], []

    def opened(path="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(service[0] + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith((service[0], "data:", "blob:")) for url in asked)


def results(page, text):
    """Names of the results once those of `text` are shown."""
    page.wait_for_function("text => document.getElementById('heading').textContent === text", arg=text)
    return page.eval_on_selector_all(".hit .name", "names => names.map((name) => name.textContent)")


def upload(page, name="mine.png", colour="red"):
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": picture(colour)})


def test_upload_type_pick_a_result_say_more_and_go_back(open_page):
    page = open_page()
    page.wait_for_selector("#grid .hit")
    assert page.inner_text("#count") == "5 pictures"
    upload(page)
    page.fill("#text", "green")
    page.click("#go")
    first = results(page, "green")
    assert len(first) == 5 and "5 results in" in page.inner_text("#status")
    page.click(".hit:has-text('blue.png') .pick")
    assert page.evaluate("document.activeElement.id") == "text" and page.input_value("#text") == ""
    page.fill("#text", "red")
    page.press("#text", "Enter")
    second = results(page, "red")
    assert "blue.png" not in second and len(second) == 4  # it is the reference now
    assert page.locator(".turn").count() == 2
    page.click("#back")
    assert results(page, "green") == first
    assert page.input_value("#text") == "green" and page.inner_text("#references .name") == "mine.png"
    page.go_forward()
    assert results(page, "red") == second
    page.locator(".turn").first.click()
    assert results(page, "green") == first


def test_a_dialogue_refines_and_the_filter_and_negatives_are_sent(open_page):
    page = open_page()
    page.fill("#text", "red")
    page.click("#go")
    results(page, "red")
    page.fill("#text", "blue")
    with page.expect_request("**/search") as sent:
        page.click("#refine")
    assert json.loads(sent.value.post_data)["text"] == "red" and json.loads(sent.value.post_data)["then"] == ["blue"]
    results(page, "red, blue")
    page.click("#advanced summary")
    page.fill("#not", "green\ngrey")
    page.select_option("#k", "24")
    with page.expect_request("**/search") as sent:
        page.click("#go")
    body = json.loads(sent.value.post_data)
    assert (body["not_text"], body["k"], body["then"]) == (["green", "grey"], 24, ["blue"])


def test_votes_are_kept_and_exported(open_page, service):
    page = open_page()
    upload(page, colour=(10, 20, 30))
    page.fill("#text", "pink")
    page.click("#go")
    results(page, "pink")
    up = page.get_by_role("button", name="Good answer: red.png")
    up.click()
    page.wait_for_selector(".good:has-text('red.png')")
    assert up.get_attribute("aria-pressed") == "true" and "Kept: red.png is a good answer" in page.inner_text("#status")
    (triplet,) = [one for one in json.loads((service[1] / "train.json").read_text()) if one["caption"] == "pink"]
    with page.expect_download() as download:
        page.click("#votes a")
    assert triplet in json.loads(download.value.path().read_text())
    page.get_by_role("button", name="Bad answer: red.png").click()
    page.wait_for_selector(".bad:has-text('red.png')")
    assert all(one["caption"] != "pink" for one in json.loads((service[1] / "train.json").read_text()))


def test_a_closer_look_shows_the_maps_over_both_pictures(open_page):
    page = open_page()
    upload(page)
    page.fill("#text", "green blue")
    page.click("#go")
    results(page, "green blue")
    page.get_by_role("button", name="Look closer: blue.png").click()
    page.wait_for_selector(".map >> nth=1")
    assert page.locator(".map strong").all_inner_texts() == ["green", "blue"]
    assert page.eval_on_selector_all("#look img", "all => all.every((one) => one.complete && one.naturalWidth > 0)")
    page.click("#take")
    assert page.inner_text("#references .name") == "blue.png" and page.evaluate("document.activeElement.id") == "text"


def test_by_keys_alone(open_page):
    page = open_page()
    page.wait_for_selector("#grid .hit")
    page.keyboard.press("/")
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    first = results(page, "red")
    for _ in range(60):  # to the first result, as someone without a mouse comes there
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "pick":
            break
    assert page.evaluate("document.activeElement.title") == first[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.title") == first[1]
    page.keyboard.press("v")
    page.wait_for_selector("#look[open]")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.title") == first[1]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    assert first[1] not in results(page, "blue")
    page.locator(".pick").first.focus()
    page.keyboard.press("g")
    page.wait_for_selector(".hit.good")
    page.go_back()
    assert results(page, "red") == first


def test_paste_and_drop_and_what_is_no_picture(open_page):
    page = open_page()
    page.wait_for_selector("#grid .hit")
    put = """([event, name, type, bytes]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], name, { type }));
        const made = event === "paste"
            ? new ClipboardEvent(event, { clipboardData: carried, bubbles: true, cancelable: true })
            : new DragEvent(event, { dataTransfer: carried, bubbles: true, cancelable: true });
        document.getElementById("text").dispatchEvent(made);
    }"""
    page.evaluate(put, ["paste", "pasted.png", "image/png", list(picture("red"))])
    page.evaluate(put, ["drop", "dropped.png", "image/png", list(picture("blue"))])
    assert page.locator("#references .name").all_inner_texts() == ["pasted.png", "dropped.png"]
    page.click("#go")
    results(page, "Like pasted.png and dropped.png")
    page.get_by_role("button", name="Remove Reference pasted.png").click()
    assert page.locator("#references .name").all_inner_texts() == ["dropped.png"]
    page.evaluate(put, ["drop", "notes.txt", "text/plain", [1, 2]])
    assert page.inner_text("#problem") == "notes.txt is no picture."
    page.click("#clear")
    page.click("#go")
    assert page.inner_text("#problem") == "Give a reference picture, a text, or both."


def test_an_error_of_the_service_is_told_and_the_results_stay(browser, service):
    context = browser.new_context()  # its console tells of the status 422
    page = context.new_page()
    page.goto(service[0])
    page.fill("#text", "red")
    page.click("#go")
    first = results(page, "red")
    page.set_input_files("#file", {"name": "cut.png", "mimeType": "image/png", "buffer": picture("red")[:60]})
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "truncated or damaged" in page.inner_text("#problem") and results(page, "red") == first
    context.close()


def test_script_in_a_file_name_stays_text(open_page):
    page = open_page()
    name = "<img src=x onerror=document.title='owned'>.png"
    upload(page, name)
    page.fill("#text", "blue")
    page.click("#go")
    results(page, "blue")
    assert page.inner_text("#references .name") == name and page.title() == "colours"


# ---- for every reader ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The source of axe-core, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("no npm, which axe-core comes from")
    command = ["npm", "pack", "axe-core@4", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm gave no axe-core within two minutes")
    if done.returncode:
        pytest.skip(f"npm gave no axe-core: {done.stderr[-300:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as packed:
        return packed.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_to_say(open_page, axe, scheme, width):
    page = open_page(viewport={"width": width, "height": 844}, color_scheme=scheme)

    def check(what):
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        told = [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found]
        assert told == [], what
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{what} is {wide} wide"

    page.wait_for_selector("#grid .hit")
    check("the start")
    upload(page)
    page.fill("#text", "green blue")
    page.click("#go")
    results(page, "green blue")
    page.click("#advanced summary")
    page.locator(".up").first.click()
    page.wait_for_selector(".hit.good")
    check("results")
    page.locator(".closer").first.click()
    page.wait_for_selector(".map")
    check("a closer look")
    page.goto(page.url + "docs")
    check("the addresses")


def test_the_token_is_asked_for_and_lets_the_page_in(browser, tmp_path):
    GalleryIndex.build(MappedColours(), make_folder(tmp_path / "pictures"), progress=False).save(tmp_path / "index")
    token = "a-token-of-sixteen-letters"
    with serving(tmp_path / "index", NEUCORE_TOKEN=token) as (url, _):
        page = browser.new_context().new_page()
        page.goto(url)
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("#login-problem:not([hidden])")
        page.fill("#token", token)
        page.press("#token", "Enter")
        page.wait_for_selector("#grid .hit img")
        page.wait_for_function("() => [...document.images].some((one) => one.naturalWidth > 0)")
        page.fill("#text", "blue")
        page.click("#go")
        assert results(page, "blue")[0] == "blue.png"
        page.context.close()
