"""A run that builds on an earlier one is not tested where that one was trained."""

import json
import shutil

import pytest
import yaml

from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.learn.seen import check_unseen, home_of
from tests.conftest import random_sequence, write_fasta


@pytest.fixture
def data(world, trained):
    """The data of the shared run (validated on chr5, tested on chr6) with changes."""

    def read(*overrides):
        return load_run_config(trained / "run.yaml", overrides=overrides).data

    return read


def test_the_home_of_a_member_is_its_run(trained, tmp_path):
    assert home_of(trained) == trained
    members = tmp_path / "run" / "members" / "0"
    members.mkdir(parents=True)
    assert home_of(members) is None
    for name in ("run.yaml", "manifest.json"):
        shutil.copy(trained / name, tmp_path / "run")
    assert home_of(members) == tmp_path / "run"
    (tmp_path / "run" / "manifest.json").unlink()
    assert home_of(members) is None


def test_the_same_test_chromosomes_are_allowed(world, trained, data):
    assert check_unseen(trained, data(), world.root, what="trunk") is False


def test_chromosomes_that_were_left_out_count_as_unseen(world, trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    tree = yaml.safe_load((run / "run.yaml").read_text())
    tree["data"]["exclude_chroms"] = ["chr2"]
    (run / "run.yaml").write_text(yaml.safe_dump(tree))
    new = data("data.split.test=[chr2,chr6]")
    assert check_unseen(run, new, world.root, what="trunk") is False
    with pytest.raises(UserError, match="was trained on chr2, on which"):
        check_unseen(trained, new, world.root, what="trunk")


@pytest.mark.parametrize("seen", ["chr1", "chr5"])
def test_testing_on_seen_chromosomes_is_refused(world, trained, data, seen):
    with pytest.raises(
        UserError,
        match=rf"The base was trained on {seen}, on which .* Hold out chr6 as the base did, or "
        r"set data\.split\.allow_leaky=true",
    ):
        check_unseen(trained, data(f"data.split.test=[{seen},chr6]"), world.root, what="base")


def test_it_is_said_where_it_is_allowed(world, trained, data):
    new = data("data.split.test=[chr1]", "data.split.allow_leaky=true")
    assert check_unseen(trained, new, world.root, what="base") is True


def test_another_genome_has_other_chromosomes(trained, data, tmp_path):
    fasta = write_fasta(tmp_path / "other.fa", {"chr1": random_sequence(500, seed=0)})
    new = data("data.split.test=[chr1]", f"data.genome={fasta}")
    assert check_unseen(trained, new, tmp_path, what="trunk") is False
    known = json.loads((trained / "manifest.json").read_text())["inputs"]["genome"]
    assert known["file"] != str(fasta)
