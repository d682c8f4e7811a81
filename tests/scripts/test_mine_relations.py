"""scripts.mine_relations on the command line."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from common.data.dataset import DatasetWriter
from ensemble.relations.rules import load_rules

ROOT = Path(__file__).parents[2]


def mine(*args):
    command = [sys.executable, "-m", "scripts.mine_relations", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every guitar is with a person, who is verified; hats lie on people."""
    folder = tmp_path_factory.mktemp("mine")
    labels, names = ["/m/p", "/m/g", "/m/h"], ["Person", "Guitar & bow", "Hat"]
    with DatasetWriter(folder / "set", "set", labels, names, None) as writer:
        for i in range(40):
            person = i < 24
            boxes, classes = [], []
            if person:
                boxes, classes = [[0, 0, 0.5, 1], [0.1, 0, 0.2, 0.1]], [0, 2]
            if i < 12:
                boxes, classes = [*boxes, [0.4, 0.4, 0.9, 0.9]], [*classes, 1]
            absent = [0] if not person else []
            writer.add_image(
                f"{i}", f"{i}.jpg", (4, 4), boxes or (), classes, None, absent, [0] * len(absent)
            )
        writer.add_split("train", range(40))
    return folder


def test_mines_and_draws(folder):
    where = (f"--dataset={folder / 'set'}", f"--output={folder / 'x.npz'}")
    result = mine(*where, f"--picture={folder / 'x.svg'}")
    assert result.returncode == 0, result.stderr
    assert "mining 40/40" in result.stdout
    assert "1.000 of 12 images: Person in images with Guitar & bow" in result.stdout
    assert "1.000 of 24 boxes: Hat inside Person" in result.stdout
    rules = load_rules(folder / "x.npz", ["/m/h", "/m/g", "/m/p"])
    assert rules.expected.counts.tolist() == [1, 1, 0]  # hat and guitar expect a person
    assert rules.outer.counts.tolist() == [1, 0, 0]
    picture = ET.parse(folder / "x.svg")
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    # Rows and columns are named; 3 of 9 pairs are known: nobody verified that a guitar is absent.
    assert texts.count("Person (24)") == texts.count("Guitar & bow (12)") == 2
    assert "100" in texts


def test_user_errors_are_one_line(folder):
    result = mine(f"--dataset={folder / 'set'}", f"--output={folder / 'y.npz'}", "--split=test")
    assert result.returncode == 1
    assert "no split 'test'" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "y.npz").exists()
