"""Processes that load examples, beside that of the run: one interpreter lock feeds no fast chip.

`pool` starts them and talks to them, `process` is what each of them runs. They write examples into
memory that is shared (`blocks`), so that no pixel goes through a pipe; what the loader is made of
is handed over once (`handover`).
"""
