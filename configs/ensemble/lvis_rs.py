"""LVIS re-scoring (RS) ensemble: rare and common classes raised before the 300-per-image cut.

    python -m ensemble.merge --config=configs/ensemble/lvis_rs.py --inputs=a.parquet,b.parquet
        --config.rescoring.groups=lvis_train.json --output=m.parquet

The factors below are a start; `python -m ensemble.rescoring` searches them on a validation split.
Paper: RS ensemble and experts 32.3 -> 35.1 AP on LVIS v0.5 validation.
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "multiplier" (default) or "exponent"."""
    config = naive.get_config()
    config.name = "lvis_rs"
    config.rescoring.mode = arg or "multiplier"
    config.rescoring.rare = 2.0
    config.rescoring.common = 1.5
    return config
