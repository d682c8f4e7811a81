"""The notebook runs from top to bottom, and the server answers a photo with JSON and a picture."""

import importlib.util
import io
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detection
from common.data.dataset import Dataset
from tests import tiny
from tests.untrained import write_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(tiny.write_dataset(folder / "tiny", num_images=4))


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny.get_config(), dataset)


def test_the_notebook_runs_from_top_to_bottom(dataset, run, capsys):
    notebook = json.loads((EXAMPLES / "python_api.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            source = f"RUN, PHOTOS = {str(run)!r}, {dataset.image_root + '/*.png'!r}"
        exec(compile(source, "python_api.ipynb", "exec"), names)
    assert len(names["counts"]) == 4 and len(names["boxes"]) > 0
    np.testing.assert_array_equal(names["from_file"].boxes, names["from_array"].boxes)
    said = capsys.readouterr().out
    assert any(name in said for name in ("red", "green", "blue"))


@pytest.fixture(scope="module")
def address(run):
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.serve(detection.load(run), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_server_answers_a_photo(address, dataset, run):
    path = dataset.image_file(0)
    photo = Path(path).read_bytes()
    with urllib.request.urlopen(f"{address}/json?min_score=0.0", data=photo) as answer:
        found = json.load(answer)
    expected = detection.load(run)(path)
    assert found == expected.to_dict() and len(found["detections"]) > 3
    with urllib.request.urlopen(f"{address}/picture", data=photo) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
    with urllib.request.urlopen(address) as answer:
        assert b"type=file" in answer.read()


@pytest.mark.parametrize(
    ("path", "data", "status", "text"),
    [
        ("/json", b"no photo", 400, "no readable image"),
        ("/json?min_score=high", b"no photo", 400, "could not convert"),
        ("/other", b"no photo", 404, "expected a photo"),
    ],
)
def test_the_server_refuses_what_is_no_photo(address, path, data, status, text):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(address + path, data=data)
    assert caught.value.code == status and text in caught.value.read().decode()
