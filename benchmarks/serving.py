"""Load test of serving: errors, wrong answers, latencies and memory of the handler and of transformers' pipeline.

    python benchmarks/serving.py --model outputs/digits_lt_fast/student --vit_s16
    python benchmarks/serving.py --model outputs/digits_lt_fast/student --seconds 3

A process serves the model over HTTP as Inference Endpoints do, with the handler and with transformers' pipeline. Eight
clients, each with its own image, first send requests to the handler only, whose memory is measured; then each uses both
in turn. Finally one client uses both in turn, and also requests attention from the handler. Every answer is compared
with the answer for the same image without load.
"""

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from series import RESULTS, write_record

HANDLER, PIPELINE, ATTENTION = "handler", "pipeline", "handler_with_attention"
TOLERANCE = 1e-5


class Service(BaseHTTPRequestHandler):
    """Answers like the toolkit of Inference Endpoints: the model's output, or status 400 with the error message."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet
    disable_nagle_algorithm = True

    def do_POST(self):
        try:
            status, answer = 200, self.server.models[self.path.strip("/")](self._request())
        except Exception as error:
            status, answer = 400, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _request(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *args):
        pass


def serve(model: str) -> None:
    """Serves the handler and the pipeline of a model, and prints the port."""
    from transformers import pipeline
    from transformers.utils import logging

    from deitlt_hf.serving.handler import EndpointHandler

    logging.disable_progress_bar()
    classifier = pipeline("image-classification", model=model)

    def native(request: dict) -> list:
        return classifier(Image.open(io.BytesIO(base64.b64decode(request["inputs"]))))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    handler = EndpointHandler(model)
    with_attention = {"parameters": {"attention": True}}
    server.models = {HANDLER: handler, PIPELINE: native, ATTENTION: lambda request: handler(request | with_attention)}
    print(server.server_port, flush=True)
    server.serve_forever()


class Client(threading.Thread):
    """Requests one image repeatedly from the given models in turn."""

    def __init__(self, port: int, seed: int, side: int, models: tuple[str, ...], seconds: float):
        super().__init__()
        self.connection = HTTPConnection("127.0.0.1", port)
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.body = json.dumps({"inputs": base64.b64encode(file.getvalue()).decode()})
        self.models, self.seconds = models, seconds
        self.latencies = {model: [] for model in models}
        self.errors, self.wrong = [], 0
        self.alone = {model: self.ask(model) for model in models}

    def ask(self, model: str) -> np.ndarray:
        """The scores of the classes in descending order."""
        self.connection.request("POST", f"/{model}", self.body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(answer["error"])
        predictions = answer if model == PIPELINE else answer[0]["predictions"]
        return np.array([prediction["score"] for prediction in predictions])

    def run(self):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            for model in self.models:
                start = time.perf_counter()
                try:
                    scores = self.ask(model)
                except (OSError, RuntimeError, ValueError) as error:
                    self.errors.append(str(error))
                    continue
                self.latencies[model].append(time.perf_counter() - start)
                self.wrong += not np.allclose(scores, self.alone[model], rtol=0, atol=TOLERANCE)


def load(port: int, num_clients: int, side: int, models: tuple[str, ...], seconds: float, watched=None) -> dict:
    """Runs clients concurrently; for a given process, returns its memory, too."""
    clients = [Client(port, seed, side, models, seconds) for seed in range(num_clients)]
    for client in clients:
        client.start()
    memory = []
    while watched is not None and any(client.is_alive() for client in clients):
        memory.append(round(watched.memory_info().rss / 2**20, 1))
        time.sleep(0.2)
    for client in clients:
        client.join()
    record = {"clients": num_clients, "seconds": seconds}
    record["errors"] = sum(len(client.errors) for client in clients)
    record["wrong_answers"] = sum(client.wrong for client in clients)
    for model in models:
        milliseconds = 1000 * np.concatenate([client.latencies[model] for client in clients])
        p50, p99 = np.percentile(milliseconds, [50, 99]).round(2).tolist()
        record[model] = {"requests": len(milliseconds), "p50_ms": p50, "p99_ms": p99}
    if memory:
        # In the first tenth, threads start and buffers reach their size.
        record["rss_mib"] = {"start": memory[0], "after_tenth": memory[len(memory) // 10], "end": memory[-1]}
    if PIPELINE in models:
        record["p50_ratio"] = round(record[HANDLER]["p50_ms"] / record[PIPELINE]["p50_ms"], 3)
    return record


def measure(model: str, seconds: float, num_clients: int) -> dict:
    """Serves a model in a separate process and measures the answers."""
    command = [sys.executable, __file__, "--model", model, "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        side = json.loads((Path(model) / "config.json").read_text())["image_size"]
        return {
            "handler_alone": load(port, num_clients, side, (HANDLER,), seconds, psutil.Process(process.pid)),
            "both_in_turn": load(port, num_clients, side, (HANDLER, PIPELINE), seconds / 2),
            "one_client": load(port, 1, side, (HANDLER, PIPELINE, ATTENTION), seconds / 2),
        }
    finally:
        process.terminate()
        process.wait()


def make_vit_s16(folder: str) -> str:
    """Saves a ViT-S/16 for 224-pixel images with random weights, as a DeiT-LT student."""
    from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification
    from deitlt_hf.data import image_processor

    torch.manual_seed(0)
    config = DeiTLTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    DeiTLTForImageClassification(config).save_pretrained(folder)
    image_processor(224).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a student")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--vit_s16", action="store_true", help="also measure a ViT-S/16 with random weights")
    parser.add_argument("--record", default=str(RESULTS / "serving.json"), help="output file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model)
        return
    record = {"threads": torch.get_num_threads(), args.model: measure(args.model, args.seconds, args.clients)}
    if args.vit_s16:
        with tempfile.TemporaryDirectory() as folder:
            record["vit_s16"] = measure(make_vit_s16(folder), args.seconds, args.clients)
    write_record(Path(args.record), record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
