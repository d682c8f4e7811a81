"""What commands on a run refuse before they begin, and say of an overridden config."""

import json

import pytest
from ml_collections import ConfigDict

from common.io.errors import UserError
from common.training import command
from common.training.workdir import read_config


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
    config.model.pretrained = "weights of long ago"
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


def test_a_start_that_finds_a_training_there_leaves_its_config(tmp_path):
    """The first has no checkpoint yet, and another config would be taken for its own."""
    quiet = dict(may_differ=(), say=lambda *_, **__: None)
    with command.training_workdir(tmp_path / "a" / "run", {"seed": 1}, **quiet) as workdir:
        with (
            pytest.raises(UserError, match="a training runs here already"),
            command.training_workdir(workdir, {"seed": 2}, **quiet),
        ):
            pass
        assert read_config(workdir) == {"seed": 1}
    with command.training_workdir(workdir, {"seed": 2}, **quiet):
        assert read_config(workdir) == {"seed": 2}
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file/run: cannot write .Not a directory"),
        command.training_workdir(tmp_path / "file" / "run", {"seed": 2}, **quiet),
    ):
        pass
