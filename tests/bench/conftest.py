"""What tests of protocols share."""

import pytest

from seq2expr.yamlfile import format_yaml


@pytest.fixture
def write(request, tmp_path):
    """Write the protocol of the module's ``tree()``, changed by a function; return its path."""

    def made(change=lambda _: None):
        path = tmp_path / "toy.yaml"
        changed = request.module.tree()
        change(changed)
        path.write_text(format_yaml(changed))
        return path

    return made
