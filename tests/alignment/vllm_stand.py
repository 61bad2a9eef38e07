"""A small server that speaks what vLLM documents of `/v1/completions`, `/v1/models`, `/collective_rpc` and `/reset_prefix_cache`, and
computes each answer with a real model, token by token, from random numbers of the request's own seed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from training.language_model import load_policy


class VllmStand:
    """`requests` are the bodies it got, by path. `troubles`: statuses it answers first, with
    `words`; `models`: what it says of them; `raw`: log-probabilities as before temperature."""

    def __init__(self, folder: Path, *, raw: bool = False, longest: int = 128) -> None:
        self.model = load_policy(folder)
        self.raw = raw
        self.longest = longest
        self.troubles: list[int] = []
        self.words = json.dumps({"error": {"message": "no luck"}}).encode()
        self.models: Any = {"object": "list", "data": [{"id": "the-policy", "object": "model"}]}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def answer(self, status: int, body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer(200, stand.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand.lock:
                    stand.requests.append((self.path, body))
                    stand.keys.append(self.headers.get("Authorization"))
                    trouble = stand.troubles.pop(0) if stand.troubles else 0
                    if trouble:
                        self.answer(trouble, stand.words)
                    else:
                        self.answer(*stand.answered(self.path, body))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "VllmStand":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def of(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]

    def answered(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            self.model = load_policy(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {}
        if path != "/v1/completions":
            return 404, {"error": {"message": f"{path} is not found"}}
        if len(body["prompt"]) >= self.longest:
            return 400, {"error": {"message": "the prompt is longer than the model"}}
        generator = torch.Generator().manual_seed(body["seed"])
        choices = [{"index": index, **self.written(body, generator)} for index in range(body["n"])]
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    @torch.no_grad()
    def written(self, body: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        ids, token_logprobs, tops = list(body["prompt"]), [], []
        stopped = False
        while not stopped and len(token_logprobs) < body["max_tokens"] and len(ids) < self.longest:
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            warm = (logits / body["temperature"]).log_softmax(-1)
            told = logits.log_softmax(-1) if self.raw else warm
            token = int(torch.multinomial(warm.exp(), 1, generator=generator))
            ids.append(token)
            token_logprobs.append(float(told[token]))
            best = told.topk(max(1, body["logprobs"]))
            tops.append({f"token_id:{place}": value for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)})
            stopped = token in body["stop_token_ids"]
        answer: dict[str, Any] = {"text": "", "finish_reason": "stop" if stopped else "length", "stop_reason": ids[-1] if stopped else None}
        answer["logprobs"] = {"tokens": [], "token_logprobs": token_logprobs, "top_logprobs": tops, "text_offset": []}
        answer["token_ids"] = ids[len(body["prompt"]) :] if body.get("return_token_ids") else None
        return answer
