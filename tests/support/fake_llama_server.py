"""A program that behaves as ``llama-server`` does, without a model.

It writes numbers: the tokens of a text are its characters' codes, and an answer counts
on from its last token. What it was started with is written to FAKE_LLAMA_LOG, a line
of JSON each, and what it is asked to FAKE_LLAMA_LOG.asked; other variables of the
environment make it fail, see below.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil  # type: ignore[import-untyped]

HELP = """----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-t,    --threads N                      number of CPU threads (default: -1)
-tb,   --threads-batch N                the same for batches, see --not-an-option
-c,    --ctx-size N                     size of the prompt context
-np,   --parallel N                     number of server slots
-m,    --model FNAME                    model path to load
--host HOST                             ip address to listen
--port PORT                             port to listen
-dev,  --device <dev1,dev2,..>          devices
--list-devices                          print list of available devices and exit
-cram, --cache-ram N                    set the maximum cache size in MiB
--spec-draft-n-max N                    number of tokens to draft (default: 3)
--spec-draft-n-min N                    minimum number of draft tokens
--spec-draft-p-min, --draft-p-min P     minimum probability (default: 0.00)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model
--spec-type draft-simple,ngram-simple,ngram-map-k,ngram-map-k4v,ngram-mod,ngram-cache
                                        comma-separated list of types
--spec-ngram-mod-n-min N                minimum number of ngram tokens
--spec-ngram-mod-n-max N                maximum number of ngram tokens
--spec-ngram-mod-n-match N              lookup length (default: 24)
--spec-ngram-simple-size-n N            ngram size N
--spec-ngram-simple-size-m N            ngram size M
--spec-ngram-map-k-size-n N             the argument has been removed. use another
--spec-ngram-map-k-size-m N             ngram size M
--spec-ngram-map-k4v-size-n N           ngram size N
--spec-ngram-map-k4v-size-m N           ngram size M
--spec-ngram-map-k4v-min-hits N         minimum hits
"""
# Options of it that take no value are none of those that the engine uses.
KNOWN = {
    *("-t", "-tb", "-c", "-np", "-m", "--host", "--port", "--device", "--cache-ram"),
    *("--spec-type", "-md", "--spec-draft-n-max", "--spec-draft-n-min"),
    *("--spec-draft-p-min", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max"),
    *("--spec-ngram-mod-n-match", "--spec-ngram-simple-size-n"),
    "--spec-ngram-simple-size-m",
    *("--spec-ngram-map-k4v-size-n", "--spec-ngram-map-k4v-size-m"),
    "--spec-ngram-map-k4v-min-hits",
    "--chat-template-file",
}
EXPECTED = {
    **{"temperature": 0.0, "top_k": 1, "cache_prompt": False, "return_tokens": True},
    "samplers": ["top_k", "temperature"],
}


def told(name: str) -> str | None:
    return os.environ.get(f"FAKE_LLAMA_{name}")


class Server(ThreadingHTTPServer):
    """It knows how it was started."""

    options: dict[str, str]
    answering = 0

    @property
    def context(self) -> int:
        return int(self.options.get("-c", "4096")) // int(self.options["-np"])


class Handler(BaseHTTPRequestHandler):
    """The paths that the engine asks."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is for what a test looks for."""

    def say(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        slots = int(self.server.options["-np"])
        speculates = "--spec-type" in self.server.options and not told("NO_DRAFT")
        answers = {
            "/health": {"status": "ok"},
            "/props": {"default_generation_settings": {"n_ctx": self.server.context}},
            "/slots": [{"id": i, "speculative": speculates} for i in range(slots)],
        }
        self.say(answers[self.path])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/apply-template":
            turns = [f"<{m['role']}>{m['content']}" for m in asked["messages"]]
            tools = "".join(f"[{tool['name']}]" for tool in asked.get("tools", []))
            self.say({"prompt": tools + "".join(turns)})
        elif self.path == "/tokenize":
            assert asked["add_special"]
            assert asked["parse_special"]
            self.say({"tokens": [ord(c) for c in asked["content"]]})
        elif self.path == "/completion":
            self.complete(asked)

    def complete(self, asked: dict[str, Any]) -> None:
        wrong = {k: asked.get(k) for k, v in EXPECTED.items() if asked.get(k) != v}
        if wrong:
            self.say({"error": {"message": f"not greedy: {wrong}"}}, 400)
            return
        if log := told("LOG"):
            said = [os.getpid(), asked.get("id_slot"), asked["prompt"]]
            with LOCK, open(f"{log}.asked", "a") as file:
                file.write(json.dumps(said) + "\n")
        if message := told("REFUSE"):
            self.say({"error": {"message": message}}, 400)
            return
        if told("DIE"):
            print("the last thing it says", flush=True)
            os.kill(os.getpid(), getattr(signal, str(told("DIE"))))
        if told("STUCK") and asked["prompt"] != [0, 0]:
            print("it looks for an answer", flush=True)
            time.sleep(60)
        last, length = asked["prompt"][-1], asked["n_predict"]
        if "n_probs" in asked:
            # The next number, and each further one half a nat less probable.
            top = [{"id": last + 1 + i, "logprob": -i / 2} for i in range(9)]
            top = top[: asked["n_probs"]]
            self.say({"completion_probabilities": [{"top_logprobs": top}]})
            return
        if (count := told("TOGETHER")) and asked["prompt"] != [0, 0]:
            # It ends only where so many requests are here at the same time.
            with LOCK:
                self.server.answering += 1
            until = time.monotonic() + 20
            while self.server.answering < int(count) and time.monotonic() < until:
                time.sleep(0.01)
            assert self.server.answering >= int(count)
        tokens = [last + 1 + i for i in range(length)]
        timings = {"prompt_ms": 1.0, "predicted_ms": 0.25, "predicted_n": length}
        if "--spec-type" in self.server.options:
            timings |= {"draft_n": 2 * length, "draft_n_accepted": length // 2}
        self.say(
            {
                "content": "".join(chr(t) for t in tokens),
                "tokens": tokens,
                "timings": timings,
                "truncated": False,
            }
        )


LOCK = threading.Lock()


def main() -> None:
    words = sys.argv[1:]
    for name in os.environ:
        if name.startswith("LLAMA_ARG_") or name == "LLAMA_API_KEY":
            print(f"error: {name} is an option, too", file=sys.stderr)
            sys.exit(1)
    if "--help" in words:
        print(HELP)
    elif "--version" in words:
        print("version: 4321 (abcdef0)\nbuilt with a keyboard", file=sys.stderr)
    elif "--list-devices" in words:
        devices = told("DEVICES")
        print("Available devices:\n  " + (devices or "(none)"))
    else:
        serve(words)


def serve(words: list[str]) -> None:
    options = dict(zip(words[::2], words[1::2], strict=True))
    for word in options:
        if word not in KNOWN:
            print(f"error: invalid argument: {word}", file=sys.stderr)
            sys.exit(1)
    if log := told("LOG"):
        with open(log, "a") as file:
            file.write(json.dumps([os.getpid(), words]) + "\n")
    if told("ALONE") and log and any(psutil.pid_exists(pid) for pid in _before(log)):
        os.kill(os.getpid(), signal.SIGKILL)
    if message := told("CANT_LOAD"):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    if told("NO_DRAFT"):
        print("E spec the vocabs are not compatible\nsomething else")
    server = Server(("127.0.0.1", int(options["--port"])), Handler)
    server.options = options
    server.serve_forever()


def _before(log: str) -> list[int]:
    """Processes that were started before this one."""
    with open(log) as file:
        return [json.loads(line)[0] for line in file][:-1]


if __name__ == "__main__":
    main()
