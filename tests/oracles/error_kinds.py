"""Kinds of wrong detections, one detection at a time, from the definition in plain Python."""


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(areas) - inter)


def error_kinds(objects, detections, verified):
    """Kinds of the detections of one image, without hierarchy and group-of boxes.

    Args:
      objects: list of (class, box).
      detections: list of (class, score, box), best score first.
      verified: classes verified in the image; the others of `objects` count too.

    Returns:
      List of (kind, number of the object it is about or None).
    """
    taken, result = set(), []
    for class_, _, box in detections:
        # Of equal overlaps the lower class, then the earlier object.
        places = [(iou(box, o[1]), -o[0], -i) for i, o in enumerate(objects)]
        own = [place for place in places if -place[1] == class_]
        other = [place for place in places if -place[1] != class_]
        own_overlap, _, own_object = max(own, default=(0.0, 0, 0))
        other_overlap, _, other_object = max(other, default=(0.0, 0, 0))
        if class_ not in verified and not own:
            result.append(("unverified", -other_object if other_overlap >= 0.5 else None))
        elif own_overlap >= 0.5 and own_object not in taken:
            taken.add(own_object)
            result.append(("correct", -own_object))
        elif own_overlap >= 0.5:
            result.append(("duplicate", -own_object))
        elif other_overlap >= 0.5:
            result.append(("class", -other_object))
        elif own_overlap >= 0.1:
            result.append(("localisation", -own_object))
        elif other_overlap >= 0.1:
            result.append(("both", -other_object))
        else:
            result.append(("background", None))
    return result
