"""What one accelerator says: correctness, speed, profile and learning; `scripts/bench/accelerator`.

`run` is the command. It starts `worker` once for each part, which runs the part's cases and reports
line by line; a case that fails, crashes or takes too long costs itself alone. docs/accelerators.md
explains how to run it.
"""
