"""Re-weighted ensemble with adj-NMS: NMS at 0.5, then the survivors lower one another (section 3).

    python -m ensemble.merge --config=configs/ensemble/adj_nms.py --inputs=a.parquet,b.parquet
        --config.weights.metrics=a.json,b.json --output=m.parquet

Paper: 59.4 -> 60.351 with four models (table 3).
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: sigma of the decay, "0.5" (default) or another number."""
    config = naive.get_config()
    config.name = "adj_nms"
    config.operator = ml_collections.ConfigDict(
        dict(
            name="adj_nms",
            iou_threshold=0.5,
            sigma=float(arg or 0.5),
            sequential=True,  # False: one pass without re-ranking
        )
    )
    return config
