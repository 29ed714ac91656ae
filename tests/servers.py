"""Servers on loopback for tests of remote shards: nginx, S3, a stub of the Hub, and a proxy that puts faults before them.

All are context managers; ports are free ones, nothing leaves this machine, and all of them end with their block.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tubelet.dist import free_port

_NGINX = """
daemon off; master_process off; worker_processes 1; pid {root}/pid; error_log {root}/error.log warn;
events {{ worker_connections 256; }}
http {{
  log_format bytes '$remote_addr|$request_method|$uri|$status|$body_bytes_sent|$http_range';
  access_log {root}/access.log bytes;
  client_body_temp_path {root}/tmp; proxy_temp_path {root}/tmp; fastcgi_temp_path {root}/tmp;
  uwsgi_temp_path {root}/tmp; scgi_temp_path {root}/tmp;
  default_type application/octet-stream; keepalive_requests 100000;
  server {{
    listen 127.0.0.1:{port}; root {folder};
    location /private/ {{ return 403; }}
    location /login/ {{ return 401; }}
    location /whole/ {{ alias {folder}/; max_ranges 0; }}
  }}
}}
"""


class Nginx:
    def __init__(self, folder, root, port):
        self.folder, self.root, self.port, self.url = folder, root, port, f"http://127.0.0.1:{port}"

    def log(self):
        """[(method, path, status, bytes of the body, Range header)] so far."""
        rows = [line.split("|") for line in (self.root / "access.log").read_text().splitlines()]
        return [(method, path, int(status), int(count), given) for _, method, path, status, count, given in rows]

    def served(self, pattern=r"\.tar$"):
        """Bytes of bodies of the files whose path matches."""
        return sum(count for _, path, _, count, _ in self.log() if re.search(pattern, path))


@contextmanager
def nginx(folder, root):
    """nginx (Debian package `nginx-light`) that serves `folder`; its logs go to `root`, which is made."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    assert os.path.exists(program), "these tests need nginx: apt-get install -y nginx-light"
    (root / "tmp").mkdir(parents=True)
    port = free_port()
    head = "user root;" if os.getuid() == 0 else ""  # else its worker could not enter pytest's folders
    (root / "conf").write_text(head + _NGINX.format(root=root, port=port, folder=folder))
    process = subprocess.Popen([program, "-p", str(root), "-c", str(root / "conf"), "-e", str(root / "error.log")],
                               stderr=subprocess.DEVNULL)
    try:
        _await(port, process)
        yield Nginx(folder, root, port)
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def s3():
    """moto's S3 server; its URL. Credentials of the environment are set to made-up ones by the caller."""
    import logging

    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # those of an earlier test know its server only
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


@contextmanager
def hub(repositories, token=None, redirect_to=None):
    """The calls that huggingface_hub makes for files of data set repositories: {"user/name": {path: bytes}}. With `token`
    all need it. `redirect_to`: base URL that `resolve` sends to, as the real one does to its CDN; a repository named ""
    answers there for plain names. Yields (url, requests), where requests collects (method, path, headers)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(self.path.split("?")[0])
            requests.append((self.command, path, dict(self.headers)))
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(401, b'{"error": "Invalid credentials"}', X_Error_Code="RepoNotFound",
                                   Content_Type="application/json")
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                if match[1] not in repositories:
                    return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
                body = {"id": match[1], "sha": "0" * 40, "private": False, "downloads": 0, "likes": 0, "tags": [],
                        "siblings": [{"rfilename": name} for name in repositories[match[1]]]}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            content = repositories.get(match[1], {}).get(match[3]) if match else repositories.get("", {}).get(path[1:])
            if content is None:
                return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound")
            if redirect_to:
                return self.answer(302, Location=f"{redirect_to}/{match[3]}?X-Amz-Signature=cdnsecret")
            given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not given:
                return self.answer(200, content, ETag='"e1"')
            first, last = int(given[1]), int(given[2] or len(content) - 1)
            part = content[first:last + 1]
            return self.answer(206, part, ETag='"e1"',
                               Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(content)}")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


class Faults:
    """What a `proxy` does to its next connections; a count says how many of them."""

    def __init__(self):
        self.reset_after = 0
        """Bytes of an answer after which the connection is reset; 0 = never."""
        self.resets = 0
        self.refusals = 0
        """Connections closed at once."""
        self.unavailable = 0
        """Requests answered by 503."""
        self.first_byte_seconds = 0.0
        self.length_added = 0
        """Bytes added to Content-Length (negative: taken away)."""
        self.lies = 0
        self.dribble_seconds = 0.0
        """Pause after every 16 bytes of an answer."""
        self.connections = 0


@contextmanager
def proxy(port):
    """A TCP proxy on loopback before `port`; yields (url, faults). Every connection serves one request."""
    listener = socket.create_server(("127.0.0.1", 0))
    faults, stopping, lock = Faults(), threading.Event(), threading.Lock()

    def take(name):
        with lock:
            left = getattr(faults, name)
            setattr(faults, name, max(0, left - 1))
            return left > 0

    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    def serve(connection):
        with suppress(OSError), connection:
            if take("refusals"):
                return reset(connection)
            request = b""
            while b"\r\n\r\n" not in request:
                got = connection.recv(65536)
                if not got:
                    return None
                request += got
            if take("unavailable"):
                return connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            request = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", request).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            with socket.create_connection(("127.0.0.1", port)) as server:
                server.sendall(request)
                breaks, lie, sent = take("resets"), take("lies"), 0
                time.sleep(faults.first_byte_seconds)
                while data := server.recv(65536):
                    if lie:
                        data = re.sub(rb"(?i)content-length: (\d+)",
                                      lambda m: b"Content-Length: %d" % (int(m[1]) + faults.length_added), data, count=1)
                        lie = False
                    if breaks and sent + len(data) > faults.reset_after:
                        connection.sendall(data[:faults.reset_after - sent])
                        time.sleep(0.02)  # a reset overtakes what it follows
                        return reset(connection)
                    for at in range(0, len(data), 16 if faults.dribble_seconds else len(data)):
                        connection.sendall(data[at:at + 16] if faults.dribble_seconds else data)
                        if faults.dribble_seconds and stopping.wait(faults.dribble_seconds):
                            return None
                    sent += len(data)
        return None

    def accept():
        while not stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            faults.connections += 1
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", faults
    finally:
        stopping.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _await(port, process, seconds=10):
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the server did not start"
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        assert time.monotonic() < deadline, "the server does not listen"
        time.sleep(0.02)
