"""One HTML page about detections tables: what is right, what is wrong, and where to look.

`analysis` streams a table and counts, `errors` says what each wrong detection is, `gains` what
repairing them would bring, `pictures` chooses and draws photos, `page` writes the HTML.
"""
