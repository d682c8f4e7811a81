"""The detections table: what models export, ensembles merge and metrics score.

Parquet, one row a detection: `image_id, label: string`, `score, xmin, ymin, xmax, ymax: float32`
(boxes normalised to [0, 1]), optionally `mask: binary` (COCO compressed RLE counts) with
`mask_height, mask_width: int32`. The file metadata holds a JSON object under the key `detections`:
model, config, dataset, split, step, `image_ids` (all images covered, with detections or not) and
`expanded` when every row was copied to its parent classes; tables of `detection.predict` also
`photo_root`, the folder (local or gs://, with a slash at its end) below which image ids are paths,
and `class_names`. Rows are sorted by image id (by code
point), then score descending. A table is one file, or a folder of shards
`part-00000-of-00004.parquet`, each with images of its own.

Scores lie in [0, MAX_SCORE]: percentages and logits are refused, while voting may raise a score
above 1 (four equal boxes: 1.2 times). Boxes may have no area (metrics drop them) but not be
inverted, and may leave [0, 1] by COORDINATE_SLACK, the rounding of a float32 division.
"""

from common.tables.reader import DetectionsReader, read_detections
from common.tables.table import Detections, shard_name
from common.tables.writer import DetectionsWriter

__all__ = ["Detections", "DetectionsReader", "DetectionsWriter", "read_detections", "shard_name"]
