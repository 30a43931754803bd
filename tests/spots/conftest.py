"""Simulated slides and a run that was trained on them; both are shared, so never changed."""

from pathlib import Path

import pytest

from tests.slides import Slides, make_slides


@pytest.fixture(scope="session")
def slides(tmp_path_factory) -> Slides:
    """Three patients with two sections each (see :mod:`tests.slides`)."""
    return make_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="session")
def run(slides, tmp_path_factory) -> Path:
    """A run trained on patients A and B."""
    return slides.train(tmp_path_factory.mktemp("spot_run") / "run")
