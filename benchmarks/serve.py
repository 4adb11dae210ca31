"""Load on `neucore serve`: many clients at once, with and without micro-batches.

    python benchmarks/serve.py INDEX [--checkpoint BEST.pth] [--seconds 60] [--clients 50]

Prints queries a second, p50 and p99, errors and memory, of a service that answers waiting queries together and of one
that answers them one at a time, and the ratio.
"""

import argparse
import collections
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

TEXTS = ("the same but a woman", "with dark skin", "now running", "make it blue", "with red hair", "an old person")


def main() -> None:
    """Both services in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--checkpoint")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--together", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.together:
        serve(arguments)
        return
    rates = {}
    for together in (1, 32):
        command = [sys.executable, __file__, *sys.argv[1:], "--together", str(together)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            port = int(process.stdout.readline())
            rates[together] = load(port, process.pid, arguments, together)
            process.terminate()
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
    running.serve(
        create_app(index, limits=Limits(together=arguments.together)), listening, lambda _: print(port, flush=True)
    )


def load(port: int, process: int, arguments: argparse.Namespace, together: int) -> float:
    """Queries a second of all clients, each of which asks again as soon as it is answered."""
    times: list[float] = []
    statuses: collections.Counter = collections.Counter()
    before, end = memory(process), time.perf_counter() + arguments.seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn = number
        while time.perf_counter() < end:
            turn += 1
            body = json.dumps({"text": TEXTS[turn % len(TEXTS)], "k": 10})
            began = time.perf_counter()
            connection.request("POST", "/search", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    rate = statuses[200] / arguments.seconds
    p50, p99 = (1000 * times[int(part * (len(times) - 1))] for part in (0.5, 0.99))
    grown = (memory(process) - before) / 2**20
    print(
        f"up to {together:2d} together, {arguments.clients} clients: {rate:7.1f} queries/s, p50 {p50:.0f} ms, "
        f"p99 {p99:.0f} ms, statuses {dict(statuses)}, memory {grown:+.0f} MB",
        flush=True,
    )
    return rate


def memory(process: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
