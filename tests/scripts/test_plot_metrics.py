"""Curves of runs: what is drawn is what was logged."""

import xml.etree.ElementTree as ElementTree

from tests.commands import run
from tests.run_logs import write_run

TEXT = "{http://www.w3.org/2000/svg}text"


def test_picture_has_a_panel_a_metric_and_names_the_runs(tmp_path):
    for name in ("a<b", "c"):
        write_run(tmp_path / name, [3.0, 2.0, 1.0])
    run(
        "scripts.plot_metrics",
        f"--workdirs={tmp_path / 'a<b'},{tmp_path / 'c'}",
        "--metrics=loss,other",
        f"--output={tmp_path / 'x.svg'}",
    )
    texts = [element.text for element in ElementTree.parse(tmp_path / "x.svg").iter(TEXT)]
    assert all(texts.count(name) == 2 for name in ("a<b", "c"))
    assert {"loss", "other"} <= set(texts)
