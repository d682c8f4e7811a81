import pytest

from common.io.commands import check_arguments
from common.io.errors import UserError
from tests.commands import ROOT, refusal

PRODUCT = ("common", "detection", "segmentation", "ensemble", "scripts")


def test_stray_arguments_are_refused():
    with pytest.raises(UserError, match="unexpected argument 'junk', expected flags only"):
        check_arguments(["junk"])
    assert check_arguments([]) == []


def test_a_command_with_actions_takes_exactly_one_of_them():
    actions = ("coco", "lvis")
    assert check_arguments(["lvis"], actions) == ["lvis"]
    for arguments in ([], ["yolo"], ["coco", "lvis"]):
        with pytest.raises(UserError, match="expected one of coco, lvis"):
            check_arguments(arguments, actions)


def test_training_refuses_a_stray_argument(tmp_path):
    config = f"--config={ROOT / 'configs' / 'detection' / 'r50.py'}"
    workdir = tmp_path / "work"
    message = refusal("detection.train", config, f"--workdir={workdir}", "junk")
    assert "unexpected argument 'junk'" in message
    assert not workdir.exists()


def test_every_command_starts_where_arguments_are_checked():
    commands = [
        path
        for folder in PRODUCT
        for path in sorted((ROOT / folder).rglob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text()
    ]
    assert len(commands) > 30
    assert not [path for path in commands if "    run_main(main" not in path.read_text()]
