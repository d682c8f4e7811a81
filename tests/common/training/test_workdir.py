import json

import pytest

from common.io.errors import UserError
from common.training.workdir import MetricsLog, prepare_workdir, read_config


def config(backbone="resnet18", canvas=(512, 512), epochs=13):
    return {
        "model": {"backbone": backbone},
        "data": {"canvas": canvas},
        "optimizer": {"num_epochs": epochs},
        "log": {"every_steps": 10},
    }


def with_checkpoint(workdir):
    """From now on the config of the work directory binds."""
    (workdir / "checkpoints" / "4").mkdir(parents=True)


def test_config_is_written_once_and_accepted_again(tmp_path):
    prepare_workdir(tmp_path / "a/b", config())
    text = (tmp_path / "a/b/config.json").read_text()
    prepare_workdir(tmp_path / "a/b", config())
    assert (tmp_path / "a/b/config.json").read_text() == text
    assert read_config(tmp_path / "a/b")["data"]["canvas"] == [512, 512]
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["config.json"]


def test_without_a_checkpoint_another_config_takes_its_place(tmp_path):
    prepare_workdir(tmp_path, config("resnet50"))
    prepare_workdir(tmp_path, config("resnet18"))
    assert read_config(tmp_path)["model"]["backbone"] == "resnet18"


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    prepare_workdir(tmp_path, config("resnet50"))
    with_checkpoint(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError) as error:
        prepare_workdir(tmp_path, config("resnet18", canvas=(640, 640)))
    assert 'config.model.backbone: work directory has "resnet50", command has "resnet18"' in str(
        error.value
    )
    assert "config.data.canvas: work directory has [512, 512], command has [640, 640]" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_a_field_that_only_one_side_has_is_named(tmp_path):
    prepare_workdir(tmp_path, config())
    with_checkpoint(tmp_path)
    other = config()
    other["model"]["remat"] = True
    with pytest.raises(UserError, match="config.model.remat: work directory has nothing"):
        prepare_workdir(tmp_path, other)


def test_listed_fields_may_change_and_the_new_values_are_recorded(tmp_path):
    prepare_workdir(tmp_path, config())
    with_checkpoint(tmp_path)
    longer = config(epochs=26)
    longer["log"]["every_steps"] = 1
    prepare_workdir(tmp_path, longer, may_differ=("optimizer.num_epochs", "log"))
    assert read_config(tmp_path)["optimizer"]["num_epochs"] == 26
    with pytest.raises(UserError, match="num_epochs"):  # a prefix means whole names
        prepare_workdir(tmp_path, config(), may_differ=("optimizer.num", "log"))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
def test_unreadable_config_is_a_users_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        prepare_workdir(tmp_path, config())


def test_a_work_directory_that_is_a_file_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        prepare_workdir(tmp_path / "file", config())
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path / "nowhere")


def test_metrics_past_the_resumed_step_are_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 8})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    log = MetricsLog(tmp_path, start_step=20)
    log.write(30, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "loss": 1.25},
        {"step": 20, "loss": 2.5},
        {"step": 30, "loss": 7.0},
    ]


def test_the_log_knows_the_evaluations_that_were_made(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(10, {"loss": 2.0})
    log.write(10, {"evaluation_of": "val coco", "evaluation/AP": 0.5, "evaluation/AP50": 0.75})
    log.write(20, {"loss": 1.0})
    log.close()
    log = MetricsLog(tmp_path, start_step=20)
    assert log.evaluation(10, "val coco") == {"AP": 0.5, "AP50": 0.75}
    assert log.evaluation(10, "val lvis") is None and log.evaluation(20, "val coco") is None
    log.close()


def test_a_fresh_start_begins_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    MetricsLog(tmp_path, start_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_fields_of_a_list_may_differ_one_by_one(tmp_path):
    def sources(folder, share):
        return config() | {"data": {"sources": [{"dir": folder, "share": share}]}}

    prepare_workdir(tmp_path, sources("a", 1))
    with_checkpoint(tmp_path)
    prepare_workdir(tmp_path, sources("b", 1), may_differ=("data.sources.*.dir",))
    with pytest.raises(UserError, match=r"config.data.sources.0.share: work directory has 1"):
        prepare_workdir(tmp_path, sources("b", 2), may_differ=("data.sources.*.dir",))


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    monkeypatch.setattr(log, "_file", open("/dev/full", "w"))
    with pytest.raises(UserError, match="metrics.jsonl: cannot write .No space left on device"):
        log.write(1, {"loss": 1.0})
    log.close()  # and says nothing more
