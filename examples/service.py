"""A text service over HTTP that keeps within what its machine has left.

    python examples/service.py BUNDLE [PORT]
    curl -N localhost:8000 -d '{"prompt": "count of Ann : 3 4 . how many does Ann have ?", "budget": 0.7}'

Without a budget the selector picks it, and changes it while the text is written. The body of the answer is the text,
piece by piece, and a last line with what ran.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from l2a_compress import Budget, L2AError
from l2a_compress.runtime import Answer, Runtime, Server


class Handler(BaseHTTPRequestHandler):
    """Takes a prompt and gives text."""

    server_version, runtime = "l2a-example", None

    def do_POST(self):
        """One prompt."""
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            budget = Budget(compute=asked["budget"]) if "budget" in asked else "auto"
            stream = self.runtime.stream(asked["prompt"], budget, seconds=asked.get("seconds"))
        except (L2AError, KeyError, TypeError, ValueError) as error:
            self.send_error(400, explain=str(error))
            return
        self.send_response(200)
        self.end_headers()
        try:
            for item in stream:
                last = isinstance(item, Answer)
                text = f"\n{item.answer}: {item.layers} layers, budget {item.budget}\n" if last else item
                self.wfile.write(text.encode())
        except (L2AError, OSError):  # it failed, or nobody listens any more
            stream.cancel()


if __name__ == "__main__":
    runtime = Runtime.open(sys.argv[1])
    print("budget now:", runtime.controller.budget())  # measures what budgets cost here, if nobody has yet
    with Server(runtime) as Handler.runtime:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8000), Handler).serve_forever()
