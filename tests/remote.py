"""A fake object store behind gs:// addresses, for tests."""

from pathlib import Path

from etils.epath import backend, gpath


class FakeStore(backend._OsPathBackend):
    """Keeps gs://bucket/name in a local folder as bucket/name."""

    def __init__(self, folder: Path):
        self.folder = folder

    def local(self, path) -> str:
        path = str(path)
        return path.replace("gs:/", str(self.folder), 1) if path.startswith("gs://") else path


def _redirect(name: str):
    def method(self, *paths, **options):
        moved = [self.local(p) if "gs://" in str(p) else p for p in paths]
        results = getattr(backend._OsPathBackend, name)(self, *moved, **options)
        if name == "glob":
            return [r.replace(str(self.folder), "gs:/", 1) for r in results]
        return results

    return method


for _name in (
    "open exists isdir listdir glob makedirs mkdir rmtree remove rename replace copy stat"
).split():
    setattr(FakeStore, _name, _redirect(_name))


def use_fake_store(monkeypatch, folder: Path) -> FakeStore:
    """Serves gs:// from `folder`; without TensorFlow, whose own client would be asked first."""
    store = FakeStore(folder)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", gpath._GCS_BACKENDS | {store})
    return store
