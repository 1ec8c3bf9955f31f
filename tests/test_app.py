"""The page in a real browser, end to end: `masa app` in a process of its own, Debian's Chromium without a window."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from masa.output.result import read_settings
from masa.weights.demo.world import render
from masa.workflows.demo import find_sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

ROOT = Path(__file__).parent.parent
PATIENCE = 120_000  # ms, on a busy machine
SOURCE, TARGET = "a photo of a cat sitting, facing left", "a photo of a cat standing, facing left"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a page on the demo model; when it ends, its files are gone."""
    folder = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "masa", "app", "--port", "0", "--dtype", "fp32", "-q"]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = ""
    while "http" not in said:
        said = server.stderr.readline()
        assert said, f"the server ended with {server.wait()}"
    yield re.search(r"http://\S+", said).group().replace("localhost", "127.0.0.1")
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 130
    assert not list(folder.glob("masa-app-*"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A sitting cat of the demo model's world, as a file."""
    scene = find_sample(20)
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.fromarray(render(scene.appearance, "sitting", scene.scene, 128)[0]).save(path)
    return path


@pytest.fixture
def open_page(browser, address):
    """A function that opens the page in a tab. In the end: none asked anything of another server, or was broken."""
    contexts, elsewhere, broken = [], [], []

    def route(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    def heard(message):
        if "Content Security Policy" in message.text:
            elsewhere.append(message.text)

    def opened(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True))
        contexts[-1].route("**/*", route)
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.on("console", heard)
        page.goto(address)
        page.wait_for_selector("#run")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert broken == []


def set_number(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def open_settings(page, steps, start_step=1):
    page.click("#settings_part button >> nth=0")
    page.wait_for_selector("#steps input[type=number]")
    set_number(page, "steps", steps)
    page.wait_for_selector(f"#start_step input[type=range][max='{steps - 1}']")  # the slider's end follows
    set_number(page, "start_step", start_step)


def choose(page, group, *names):
    for name in names:
        page.locator(f"#{group} label", has_text=re.compile(f"^ *{re.escape(name)} *$")).click()


def run(page):
    """Press Run and wait for the end; what is said then."""
    page.click("#run")
    page.wait_for_selector("#run[disabled]")
    page.wait_for_selector("#run:not([disabled])")
    return page.inner_text("#progress")


def give_picture(page, picture):
    choose(page, "kind", "a picture")
    page.wait_for_selector("#picture canvas")
    page.set_input_files("#picture input[type=file] >> nth=0", picture)
    page.wait_for_selector("#picture button[aria-label='Brush']")
    page.wait_for_timeout(500)


def stroke(page, name):
    """A stroke of the brush across the middle of a canvas."""
    canvas = page.locator(f"#{name} canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x, y + 30, steps=4)
    page.mouse.move(x + 40, y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(800)  # the editor sends what was drawn


def download(page, name, folder):
    with page.expect_download() as waiting:
        page.locator("#files tr", has=page.locator(f"[aria-label='{name}']")).locator("a").click()
    path = folder / name
    waiting.value.save_as(path)
    return path


def test_editing_a_picture_under_a_painted_mask_by_several_methods(open_page, picture, tmp_path):
    page = open_page()
    give_picture(page, picture)
    open_settings(page, 3)
    choose(page, "methods", "Fixed seed", "MasaCtrl, masked")
    choose(page, "mask", "painted")
    stroke(page, "picture")
    assert "Done" in run(page)
    page.wait_for_selector("#gallery img >> nth=3")
    assert page.locator("#gallery .caption-label").all_inner_texts() == [
        *("source", "Fixed seed", "MasaCtrl", "MasaCtrl, masked")
    ]
    assert "inverted by ddim" in page.inner_text("#table")

    file = download(page, "masactrl-masked_0.png", tmp_path)
    settings = read_settings(file)
    assert settings["target"] == [TARGET]
    assert settings["controls"][0]["mask"]["kind"] == "GivenMasks"
    command = [sys.executable, "-m", "masa", "rerun", str(file), "-o", "again", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    with Image.open(file) as first, Image.open(tmp_path / "again" / "target_0.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))

    page.click("#attention_part button >> nth=0")
    choose(page, "words", "cat")
    page.wait_for_selector("#attention img >> nth=3")
    # A second prompt: what was inverted is not inverted again.
    page.fill("#targets textarea", "a photo of a cat jumping, facing left")
    page.click("#run")
    texts = set()
    while page.locator("#run[disabled]").count() or not texts:
        texts.add(page.inner_text("#progress"))
        page.wait_for_timeout(100)
    assert not any("inverting" in text for text in texts)
    assert "jumping" in page.inner_text("#table")


def test_a_words_mask_and_a_drawn_layout(open_page, picture):
    page = open_page()
    give_picture(page, picture)
    open_settings(page, 2)
    choose(page, "methods", "MasaCtrl, masked")
    page.click("#show_mask")
    page.wait_for_selector("#mask_shown img")
    shown = page.get_attribute("#mask_shown img", "src")
    set_number(page, "threshold", 0.7)
    page.wait_for_function("shown => document.querySelector('#mask_shown img').src != shown", arg=shown)

    choose(page, "methods", "MasaCtrl, masked")
    page.click("#layout_part button >> nth=0")
    page.click("#adapter input")
    page.click("[role=option]:has-text('stick figures')")
    page.wait_for_selector("#layout canvas")
    page.wait_for_selector("#layout button[aria-label='Brush']")
    page.wait_for_timeout(1000)
    assert "wants a layout" in run(page)  # nothing is drawn yet
    stroke(page, "layout")
    assert "Done" in run(page)
    assert "T2IAdapter(path=demo" in page.inner_text("#table")


def test_a_runs_size_follows_the_picture_and_its_crop(open_page, tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (600, 240), "green").save(wide)
    page = open_page()
    page.click("#settings_part button >> nth=0")
    page.wait_for_selector("#width input[type=number]")
    give_picture(page, wide)
    page.wait_for_function("document.querySelector('#width input[type=number]').value == 320")
    page.click("#picture button[aria-label='Image']")
    page.click("#picture button[aria-label='Crop']")
    page.wait_for_timeout(1000)
    canvas = page.locator("#picture canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["y"] + 0.45 * box["height"]
    page.mouse.move(box["x"] + box["width"] - 27, middle)  # the right edge's handle
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=12)
    page.mouse.up()
    page.click("#picture button[aria-label='Confirm crop']")
    page.wait_for_function("document.querySelector('#width input[type=number]').value < 200")


def test_cancel_and_reload_during_a_run_and_a_second_tab(open_page):
    one, two = open_page(), open_page()
    open_settings(one, 2)
    assert "Done" in run(one)
    assert two.locator("#gallery img").count() == 0

    set_number(one, "steps", 200)
    one.click("#run")
    one.wait_for_selector("#progress .bar")
    one.wait_for_selector("#live img")
    two.click("#run")
    two.wait_for_selector("#progress:has-text('Waiting for its turn')")
    began = time.monotonic()
    one.click("#cancel")
    one.wait_for_selector("#progress:has-text('Cancelled')")
    assert time.monotonic() - began < 10.0  # 200 steps take a minute and more
    two.wait_for_selector("#progress .bar")
    two.reload()  # in the middle of its run, which ends with it
    two.wait_for_selector("#run")
    assert two.locator("#gallery img").count() == 0
    set_number(one, "steps", 2)
    began = time.monotonic()
    assert "Done" in run(one)
    assert time.monotonic() - began < 60.0
    open_settings(two, 2)
    assert "Done" in run(two)


def test_what_is_served_names_no_other_server_and_fits_a_phone(open_page, address):
    import urllib.request

    with urllib.request.urlopen(address) as response:
        html = response.read().decode()
    named = set(re.findall(r"https?://[\w.:-]+", html))
    assert named <= {address, address.replace("127.0.0.1", "localhost"), "http://www.w3.org"}
    page = open_page(390, 844)
    open_settings(page, 2)
    page.fill("#source textarea", SOURCE)
    assert "Done" in run(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    choose(page, "kind", "a picture")
    page.fill("#targets textarea", "")
    assert "no picture yet" in run(page)
