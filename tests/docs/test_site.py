"""The site builds without a warning, and asks the network for nothing when it is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hecate
from tests.docs.pages import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # No network: names do not resolve through a proxy that is not there.
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\">\s]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preconnect)[^>]*href=\"?([^\">\s]+)", text)
        assert loaded
        assert not [url for url in loaded if "//" in url], page.name
    assert not [style for style in site.rglob("*.css") if re.search(r"url\([\"']?https?:", style.read_text())]


def test_api_page_has_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in hecate.__all__:
        if name != "__version__":
            assert f'id="hecate.{name}"' in text
