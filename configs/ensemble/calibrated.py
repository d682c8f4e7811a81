"""Calibrated ensemble: scores become precisions first, then tables of any detectors are merged.

    python -m ensemble.calibrate --inputs=a=a.parquet,b=b.parquet --dataset=DIR --split=val_a
        --output=cal.json
    python -m ensemble.merge --config=configs/ensemble/calibrated.py --config.calibration=cal.json
        --inputs=a=a_test.parquet,b=b_test.parquet --output=m.parquet

Merges by the recipe that was best on the folds of the split; it may be the best table alone. Any
other config with `--config.calibration=cal.json` takes the calibrated scores and its own operator.
Hardware: two CPU cores; minutes.
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "recipe" (default), or an operator to use instead, such as "wbf"."""
    config = naive.get_config(arg or "recipe")
    config.name = "calibrated"
    return config
