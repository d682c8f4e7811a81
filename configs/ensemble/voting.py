"""Re-weighted ensemble with voting: suppressed boxes vote on scores and boxes (equations 8 and 9).

    python -m ensemble.merge --config=configs/ensemble/voting.py --inputs=a.parquet,b.parquet
        --config.weights.metrics=a.json,b.json --output=m.parquet

Works without the metrics too; all models then weigh the same.
Paper: about +0.3 mAP on the leaderboard.
"""

import ml_collections

from configs.ensemble import naive


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of votes, "4" (default) or another number."""
    config = naive.get_config()
    config.name = "voting"
    config.operator = ml_collections.ConfigDict(
        dict(
            name="voting",
            iou_threshold=0.5,
            k=int(arg or 4),
            score_weight=0.05,
            box_weight=0.3,
            few="mean",  # mean | fixed: fewer than k votes
            sigma=0.5,  # of the decay afterwards
        )
    )
    return config
