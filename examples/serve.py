"""Serves a detector over HTTP: one photo in, JSON or a picture out.

    python examples/serve.py run                 # work directory, or file of scripts.export_weights
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/json?min_score=0.4'
    curl --data-binary @photo.jpg http://127.0.0.1:8000/picture --output found.jpg

http://127.0.0.1:8000 in a browser is a page that sends a photo. An example to start from: one photo
at a time, no encryption, no accounts.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import detection
from common.io.errors import UserError

MAX_BYTES = 50_000_000
PAGE = b"""<!doctype html><meta name=viewport content="width=device-width"><title>Detector</title>
<input type=file accept="image/*" aria-label=Photo><p id=says></p><img id=found style="width:100%">
<script>document.querySelector("input").onchange = async event => {
  says.textContent = "looking ..."
  const answer = await fetch("/picture", {method: "POST", body: event.target.files[0]})
  says.textContent = answer.ok ? "" : await answer.text()
  found.src = answer.ok ? URL.createObjectURL(await answer.blob()) : ""
}</script>"""


class Handler(BaseHTTPRequestHandler):
    """Answers a request; `detector` is set by `serve`."""

    detector: detection.Detector

    def do_GET(self) -> None:
        self.answer(200, "text/html", PAGE)

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        if url.path not in ("/json", "/picture"):
            return self.answer(404, "text/plain", b"expected a photo for /json or /picture")
        try:
            length = int(self.headers.get("Content-Length", 0))
            if not 0 < length <= MAX_BYTES:
                raise ValueError(f"found {length} bytes, expected a photo of at most {MAX_BYTES}")
            min_score = float(parse_qs(url.query).get("min_score", ["0.4"])[0])
            result = self.detector(self.rfile.read(length), score_threshold=min_score)
        except (UserError, ValueError) as error:  # no photo, no number
            return self.answer(400, "text/plain", str(error).encode())
        if url.path == "/json":
            return self.answer(200, "application/json", json.dumps(result.to_dict()).encode())
        picture = io.BytesIO()
        result.draw(min_score).save(picture, "JPEG")
        self.answer(200, "image/jpeg", picture.getvalue())

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(detector: detection.Detector, host: str, port: int) -> HTTPServer:
    """A server that `serve_forever` runs; port 0 takes a free one."""
    return HTTPServer((host, port), type("DetectorHandler", (Handler,), {"detector": detector}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="work directory, or file of scripts.export_weights")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server = serve(detection.load(arguments.run), arguments.host, arguments.port)
    print(f"http://{arguments.host}:{server.server_port}", flush=True)
    server.serve_forever()
