"""Work directories that hold nothing but a log."""

import json


def write_run(workdir, values):
    workdir.mkdir()
    lines = [json.dumps({"step": 10 * i, "loss": v}) for i, v in enumerate(values, 1)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "other": 1.0}\n')
    return workdir
