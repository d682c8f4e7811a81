"""Detections in the forms of challenge servers and of other tools, both ways.

    openimages_csv      submission CSV of the OpenImages challenge, and its offline evaluator's CSV
    results_json        COCO and LVIS results
    ids                 numbers of images and categories in COCO files <-> ids and labels of tables

Everything is streamed: memory holds a chunk of rows and one entry per image.
"""
