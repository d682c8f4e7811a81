"""What commands on a run refuse before they begin, and say of an overridden config."""

import json

import pytest
from ml_collections import ConfigDict

from common.io.errors import UserError
from common.training import command


class Settings:
    """A config as it is."""

    def __init__(self, config):
        self._config = config

    def to_dict(self):
        return self._config.to_dict()


def trained(tmp_path, **data):
    config = {"data": {"canvas": [800, 1333], "dir": "a", **data}, "model": {"norm": "sync"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ConfigDict({"data": {**config["data"]}, "model": {**config["model"]}})


def read(config, tmp_path):
    said = []
    command.read_trained(Settings, config, str(tmp_path), lambda text, **_: said.append(text))
    return said


def test_another_canvas_than_that_of_the_training_is_said(tmp_path):
    config = trained(tmp_path)
    config.data.dir = "b"  # other photos are no other model
    assert read(config, tmp_path) == []
    config.data.canvas = (64, 64)
    (note,) = read(config, tmp_path)
    assert (
        "not as the model was trained: config.data.canvas: work directory has [800, 1333]" in note
    )
    with pytest.raises(UserError, match="config.json: no such file"):
        read(None, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("pretrained", "init_from", "text"),
    [
        ("gone.safetensors", "", "config.model.pretrained: gone.safetensors: no such file"),
        ("folder", "", "folder is a folder, expected a file written by scripts.convert_weights"),
        ("", "gone", "config.init_from: gone: no such file or work directory"),
    ],
)
def test_weights_that_are_not_there_are_refused_at_once(
    tmp_path, monkeypatch, pretrained, init_from, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=text):
        command.check_weights(pretrained, init_from)
    command.check_weights("", "folder")
