"""A local server of the OpenAI-compatible chat API that does what a test tells it."""

from __future__ import annotations

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def good(payload: dict) -> bytes:
    """An answer that says the same in other words, line by line."""
    lines = payload["messages"][-1]["content"].split("\n")
    if len(lines) == 1:
        return said("In this picture: " + lines[0])
    return said("\n".join(line.replace(". ", ". In this picture: ", 1) for line in lines))


def said(text: str | None, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()


class ChatServer:
    """Answers POST requests with `behave(number, payload)`, numbered from 0 in order of arrival.

    It returns the body of a 200, (status, headers, body), or "reset" or "drip" for a connection
    that breaks or never gets anywhere. Use as a context manager.

    Attributes:
      requests: payloads in order of arrival; headers: of the same requests.
      most: largest number of requests that were in progress at the same time.
    """

    def __init__(self, behave=lambda number, payload: good(payload), seconds=0.0):
        self.behave, self.seconds = behave, seconds
        self.requests, self.headers, self.paths = [], [], []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *args):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler):
        payload = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append(payload)
            self.headers.append(handler.headers)
            self.paths.append(handler.path)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.closing.wait(self.seconds)
            self.send(handler, self.behave(number, payload))
        except OSError:  # the client has gone
            handler.close_connection = True
        finally:
            with self.lock:
                self.running -= 1

    def send(self, handler, answer):
        if answer == "reset":
            # Closing with a linger time of 0 sends a reset.
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.connection.close()
            handler.close_connection = True
            return
        if answer == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            while not self.closing.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
            return
        status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def texts(self) -> list[str]:
        """What was asked for, in order of arrival."""
        return [payload["messages"][-1]["content"] for payload in self.requests]
