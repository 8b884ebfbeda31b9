"""An S3 server on loopback, as much of one as reading needs: HEAD, GET of ranges and ListObjectsV2,
over a dict.

It counts and can be made to fail; signatures are not checked."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class ObjectStore(ThreadingHTTPServer):
    """`objects`: "bucket/key" → bytes. `asked`: how often each range of each object was given out.
    `before` is called with an object's name and range before it is answered; a status it returns is
    answered instead."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[tuple[str, int, int]] = Counter()
        self.before: Callable[[str, int, int], int | None] = lambda name, start, end: None
        self.cut = 0  # bytes left out at the end of each answer
        self.bytes_per_second = 0.0  # of all connections together; 0: no limit
        self._free_at = 0.0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "id-of-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
            "AWS_REGION": "us-east-1",
        }

    def count(self, end_of_name: str) -> int:
        return sum(
            times for (name, _, _), times in self.asked.items() if name.endswith(end_of_name)
        )

    def take_time(self, num_bytes: int) -> None:
        if self.bytes_per_second:
            with self.lock:
                self._free_at = (
                    max(self._free_at, time.monotonic()) + num_bytes / self.bytes_per_second
                )
                until = self._free_at
            time.sleep(max(until - time.monotonic(), 0))


@cache
def _etag(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ObjectStore

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "list-type" in parse_qs(url.query):
            self._send(200, self._listing(unquote(url.path).strip("/"), parse_qs(url.query)))
        else:
            self._answer(is_head=False)

    def _answer(self, is_head: bool) -> None:
        name = unquote(urlsplit(self.path).path).strip("/")
        if name not in self.server.objects:
            self._send(404, b"", is_head=is_head)
            return
        content = self.server.objects[name]
        headers = {"ETag": f'"{_etag(content)}"', "Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}
        if is_head:
            self._send(200, content, headers, is_head=True)
            return
        start, end = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        with self.server.lock:
            self.server.asked[name, start, end] += 1
        if status := self.server.before(name, start, end):
            self._send(status, b"<Error/>")
            return
        self.server.take_time(end - start)
        data = self.server.objects[name][start:end]
        self._send(206 if match else 200, data, headers, cut=self.server.cut)

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        items, folders = [], set()
        for name, content in sorted(self.server.objects.items()):
            of, _, key = name.partition("/")
            if of != bucket or not key.startswith(prefix):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                folders.add(prefix + head + delimiter)
                continue
            items.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-02T10:00:00.000Z</LastModified>"
                f"<ETag>&quot;{_etag(content)}&quot;</ETag><Size>{len(content)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
        items += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        ]
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}'
            f"</Prefix><KeyCount>{len(items)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{''.join(items)}</ListBucketResult>"
        ).encode()

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        is_head: bool = False,
        cut: int = 0,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body[: len(body) - cut])
            self.close_connection = cut > 0

    def log_message(self, format: str, *args: Any) -> None:
        pass
