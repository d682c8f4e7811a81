"""Naive ensemble with each model's scores weighted by its validation AP of the class (PFDet).

    python -m ensemble.merge --config=configs/ensemble/reweighted.py --inputs=a.parquet,b.parquet
        --config.weights.metrics=a.json,b.json --output=m.parquet

The JSON files come from detection.evaluate or scripts.score --json on a validation split.
Paper: 57.994 -> 59.4 with four models (table 3).
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: exponent of the relative AP, "1" (default) or another number."""
    config = naive.get_config()
    config.name = "reweighted"
    config.weights.exponent = float(arg or 1)
    return config
