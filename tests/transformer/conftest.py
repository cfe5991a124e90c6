"""One thread: models this small are slower with two, much slower beside a busy neighbour.

And a browser, for the tests of pages; they are skipped, with a reason, where there is none.
"""

import os
import shutil

import pytest
import torch
from planted import planted_task


@pytest.fixture(autouse=True)
def one_thread(clean_state):
    """`clean_state` puts the threads back."""
    torch.set_num_threads(1)


@pytest.fixture
def task():
    """The planted circuit's task and model."""
    return planted_task()


@pytest.fixture
def refused(capsys):
    """Checks that a program ended with status 2 and one sentence; returns what it had printed."""

    def check(status, message):
        out, error = capsys.readouterr()
        assert status == 2
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return out

    return check


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [shutil.which(name) for name in names]
    return next((path for path in (os.environ.get("SPARSE_CHROMIUM"), *found) if path), None)


@pytest.fixture(scope="module")
def browser():
    """Real headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium: neither in SPARSE_CHROMIUM nor in PATH")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end there may be no message and no request beside the file."""
    contexts, messages, requests = [], [], []

    def opened(path, width=1360, height=900, **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, offline=True, **options
        )
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: messages.append(message.text))
        shown.on("pageerror", lambda error: messages.append(str(error)))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert not messages
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
