"""The files of the page: their policy, and nothing from elsewhere."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from servers import serving

from treeflash.serving import page


@pytest.fixture(scope="module")
def server(model):
    with serving(model, api_keys=("secret",)) as running:
        yield running


@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_files_need_no_key_and_have_a_policy(server, path):
    response = server.client.get(path)
    assert response.status_code == 200
    assert server.client.head(path).status_code == 200  # Claude Code sends it first
    assert response.headers["content-type"].startswith("text/")
    directives = response.headers["content-security-policy"].split("; ")
    policy = {name: sources for name, *sources in map(str.split, directives)}
    # What `default-src` does not stand in for, too.
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy.pop(name) == ["'none'"]
    assert policy.pop("img-src") == ["data:"]
    assert {source for sources in policy.values() for source in sources} == {"'self'"}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", page.PAGE_FILES)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_html(name):
    text = resources.files(page).joinpath(name).read_text()
    urls = re.findall(r"https?://[^\"' )]+", text)
    assert urls in ([], ["http://www.w3.org/2000/svg"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", text)


def test_the_page_names_its_files():
    text = resources.files(page).joinpath("index.html").read_text()
    for name in page.VENDORED:  # only through our own module
        assert name not in text
    for name in ("page.css", "chat.js"):
        assert f'"{name}"' in text


def test_licences_of_vendored_libraries_are_shipped():
    folder = resources.files(page).joinpath("vendor")
    for name in page.VENDORED:
        library = name.partition("/")[2].removesuffix(".js")
        assert "Copyright" in folder.joinpath(f"LICENSE-{library}").read_text()
        assert "sourceMappingURL" not in folder.joinpath(f"{library}.js").read_text()
