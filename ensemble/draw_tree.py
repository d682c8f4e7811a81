"""Draws an ensemble tree with the mAP at every node as an SVG picture.

    python -m ensemble.draw_tree --tree=tree.json --output=tree.svg

Leaves stand on the left, the root on the right. `ensemble.search` notes the mAP of every subtree
in the file; without notes only the operators are drawn.
"""

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from absl import flags

from common.io.atomic import write_text
from common.io.commands import run_main
from ensemble.tree import binary_tree as trees
from ensemble.tree.binary_tree import Leaf, Node

LEAF_WIDTH, LEAF_HEIGHT = 170, 40
NODE_WIDTH, NODE_HEIGHT = 132, 56
ROW, COLUMN, MARGIN = 64, 232, 20


def draw(tree: trees.Tree, notes: Mapping[str, Any]) -> str:
    """SVG text of a tree; `notes` as `ensemble.search` writes them, or empty."""
    nodes = dict((path, node) for node, path in trees.walk(tree.root))
    columns = {path: _height(node) for path, node in nodes.items()}
    rows: dict[str, float] = {}
    for path, node in nodes.items():
        if isinstance(node, Leaf):
            rows[path] = len(rows)
    for path in sorted(nodes, key=len, reverse=True):
        if path not in rows:
            rows[path] = (rows[path + "l"] + rows[path + "r"]) / 2
    splits, scores = notes.get("splits", []), notes.get("nodes", {})
    num_leaves = len(trees.leaves(tree.root))
    width = 2 * MARGIN + LEAF_WIDTH + columns[""] * COLUMN
    height = 2 * MARGIN + num_leaves * ROW + 18 * bool(splits)

    def centre(path: str) -> tuple[float, float]:
        column = columns[path]
        x = MARGIN + LEAF_WIDTH / 2 if not column else MARGIN + LEAF_WIDTH + (column - 0.3) * COLUMN
        return x, MARGIN + (rows[path] + 0.5) * ROW

    edges, shapes = [], []
    for path, node in nodes.items():
        x, y = centre(path)
        if isinstance(node, Leaf):
            shapes.append(
                _shape(
                    x,
                    y,
                    LEAF_WIDTH,
                    LEAF_HEIGHT,
                    "#eef4fb",
                    [_short(node.model)],
                    _values(scores.get(path)),
                )
            )
            continue
        operators = node.operators
        details = f"vote {operators.vote:g}, box {operators.box:g}"
        shapes.append(
            _shape(
                x,
                y,
                NODE_WIDTH,
                NODE_HEIGHT,
                "#fdf3e3" if path else "#e4f3e6",
                [operators.nms, details],
                _values(scores.get(path)),
            )
        )
        for index, side in enumerate("lr"):
            child_x, child_y = centre(path + side)
            child_x += (LEAF_WIDTH if isinstance(nodes[path + side], Leaf) else NODE_WIDTH) / 2
            end, middle = x - NODE_WIDTH / 2, x - NODE_WIDTH / 2 - 66
            target = y + (-12 if index == 0 else 12)
            edges.append(
                f'<path d="M{child_x:.1f} {child_y:.1f}H{middle - 20:.1f}'
                f'L{middle:.1f} {target:.1f}H{end:.1f}" fill="none" stroke="#888" '
                'stroke-width="1.5"/>'
            )
            element = operators.elements[index]
            note = f"×{operators.weights[index]:.2g}"
            colour = "#333" if element == "both" else "#c0392b"
            note += "" if element == "both" else f" {element}"
            edges.append(
                f'<text x="{end - 4:.1f}" y="{target - 4 if index == 0 else target + 12:.1f}" '
                f'text-anchor="end" fill="{colour}">{note}</text>'
            )
    if splits:
        shapes.append(
            f'<text x="{MARGIN}" y="{height - MARGIN:.0f}" fill="#555">mAP on '
            f"{escape(' / '.join(splits))}; ×: weight of the scores; red: scores or boxes only"
            "</text>"
        )
    body = "\n".join(edges + shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n{body}\n</svg>\n'
    )


def _height(node: Leaf | Node) -> int:
    return 0 if isinstance(node, Leaf) else 1 + max(_height(node.left), _height(node.right))


def _values(scores: list[float] | None) -> str:
    return " / ".join(f"{100 * score:.2f}" for score in scores or [])


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"…{name[-25:]}"


def _shape(x, y, width, height, fill, lines, values) -> str:
    parts = [
        f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width}" '
        f'height="{height}" rx="6" fill="{fill}" stroke="#666"/>'
    ]
    texts = [(line, "") for line in lines] + ([(values, ' font-weight="bold"')] if values else [])
    for index, (text, style) in enumerate(texts):
        at = y + 4 + 16 * (index - (len(texts) - 1) / 2)
        parts.append(
            f'<text x="{x:.1f}" y="{at:.1f}" text-anchor="middle"{style}>{escape(text)}</text>'
        )
    return "\n".join(parts)


def define_flags() -> None:
    flags.DEFINE_string("tree", None, "JSON file of ensemble.search.", required=True)
    flags.DEFINE_string("output", None, "SVG file to write.", required=True)


def main():
    tree = trees.load(flags.FLAGS.tree)
    write_text(flags.FLAGS.output, draw(tree, trees.read_notes(flags.FLAGS.tree)))
    print(f"wrote {flags.FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
