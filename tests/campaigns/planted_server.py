"""A server with faults that the storm has to find: other answers each time, status 500, and files that stay open."""

import itertools
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

count, kept = itertools.count(), []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"free": 8, "waiting": 0})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kept.append(open("/dev/null"))
        try:
            asked = json.loads(body)["messages"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.answer(500, {"error": "it was no JSON"})
        self.answer(200, {"choices": [{"message": {"content": f"{next(count)} {len(asked)}"}}]})

    def answer(self, status: int, values: dict) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"m: http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
