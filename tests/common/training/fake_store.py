"""The key-value store of JAX's coordination service, in memory."""

import threading


class FakeStore:
    """What `common.training.team.Store` asks for; `close` is the end of process 0."""

    def __init__(self, count: int = 2):
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._barriers: dict[str, threading.Barrier] = {}
        self._count = count

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            self._check()
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self._changed.notify_all()

    def key_value_dir_get(self, key):
        with self._changed:
            self._check()
            return sorted(item for item in self.values.items() if item[0].startswith(key))

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self.values, 60)
            self._check()
            return self.values[key]

    def wait_at_barrier(self, barrier_id, timeout_in_ms):
        with self._changed:
            barrier = self._barriers.setdefault(barrier_id, threading.Barrier(self._count))
        try:
            barrier.wait(timeout_in_ms / 1000)
        except threading.BrokenBarrierError as error:
            raise RuntimeError("DEADLINE_EXCEEDED: barrier") from error

    def close(self):
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check(self):
        if self._closed:
            raise RuntimeError("UNAVAILABLE: Socket closed")
