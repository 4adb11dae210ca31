"""Load on `neucore serve`: many clients at once, with and without micro-batches.

    python benchmarks/serve.py INDEX [--checkpoint BEST.pth] [--seconds 60] [--clients 50] [--uploads 20] [--waiting 64]

Prints queries a second, p50 and p99, errors and memory, of a service that answers waiting queries together and of one
that answers them one at a time, and the ratio. One query in `--uploads` (0: none) uploads a reference of 512 x 512.
A small `--waiting` shows the 503 of a full queue. Memory: its growth, and the slope over the second half of the time.
"""

import argparse
import collections
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

TEXTS = ("the same but a woman", "with dark skin", "now running", "make it blue", "with red hair", "an old person")


def main() -> None:
    """Both services in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--checkpoint")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--uploads", type=int, default=20)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--together", type=int, help="this alone: queries answered together at most")
    parser.add_argument("--service", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.service:
        serve(arguments)
        return
    rates = {}
    for together in [arguments.together] if arguments.together else (1, 32):
        command = [sys.executable, __file__, *sys.argv[1:], "--together", str(together), "--service"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
            port = int(process.stdout.readline())
            rates[together] = load(port, process.pid, arguments, together)
            process.terminate()
    if len(rates) == 2:
        print(f"together / one at a time: {rates[32] / rates[1]:.2f} times the queries a second")


def serve(arguments: argparse.Namespace) -> None:
    """The service, in a process of its own; its port on standard output."""
    from neucore_plugin import load_model
    from neucore_plugin.retrieval import GalleryIndex
    from neucore_plugin.serve import running
    from neucore_plugin.serve.app import create_app
    from neucore_plugin.serve.guard import Limits

    index = GalleryIndex.open(arguments.index)
    index.attach(load_model(arguments.checkpoint or index.manifest.checkpoint))
    index.search(text="a picture")
    listening = running.bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    limits = Limits(together=arguments.together, waiting=arguments.waiting)
    running.serve(create_app(index, limits=limits), listening, lambda _: print(port, flush=True))


def load(port: int, process: int, arguments: argparse.Namespace, together: int) -> float:
    """Queries a second of all clients, each of which asks again as soon as it is answered."""
    times: list[float] = []
    statuses: collections.Counter = collections.Counter()
    sizes, end, form = [], time.perf_counter() + arguments.seconds, upload()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn = number
        while time.perf_counter() < end:
            turn += 1
            body, kind = json.dumps({"text": TEXTS[turn % len(TEXTS)], "k": 10}), "application/json"
            if arguments.uploads and turn % arguments.uploads == 0:
                body, kind = form, "multipart/form-data; boundary=x"
            began = time.perf_counter()
            connection.request("POST", "/search", body, {"Content-Type": kind})
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    while time.perf_counter() < end:
        sizes.append(memory(process) / 2**20)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    times.sort()
    rate = statuses[200] / arguments.seconds
    p50, p99 = (1000 * times[int(part * (len(times) - 1))] for part in (0.5, 0.99))
    half = sizes[len(sizes) // 2 :]
    slope = np.polyfit(np.arange(len(half)) / 120, half, 1)[0]
    print(
        f"up to {together:2d} together, {arguments.clients} clients: {rate:7.1f} queries/s, p50 {p50:.0f} ms, "
        f"p99 {p99:.0f} ms, statuses {dict(statuses)}, "
        f"memory {sizes[0]:.0f} to {sizes[-1]:.0f} MB, at last {slope:+.1f} MB a minute",
        flush=True,
    )
    return rate


def upload() -> bytes:
    """A form with a picture of noise, which is the worst to decode."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(stream, "PNG")
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    text = b'\r\n--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nmake it blue\r\n--x--\r\n'
    return head + stream.getvalue() + text


def memory(process: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
