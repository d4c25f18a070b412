"""The pictures of pages in the documents: docs/images/make.sh takes them in a real Chromium."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from helpers import ROOT, server_python

PICTURES = ["report", "cases", "words", "compare", "review", "serving"]


def test_pictures_of_the_documents_are_small():
    paths = sorted((ROOT / "docs/images").glob("*.png"))
    assert {path.stem for path in paths} >= set(PICTURES)
    assert max(path.stat().st_size for path in paths) <= 200_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: apt-get install chromium")
def test_the_script_takes_them_all(checkpoint, tmp_path):
    process = subprocess.run(
        ["sh", "docs/images/make.sh"], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300, env={
            **os.environ, "PYTHON": sys.executable, "SERVER_PYTHON": str(server_python("simple-serving")),
            "MODEL": str(checkpoint), "PICTURES": str(tmp_path), "WORK": str(tmp_path / "a b")})
    assert process.returncode == 0, process.stderr
    for name in PICTURES:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width == 1000 and len(picture.getcolors()) > 16  # a page that failed to load has a few colours
