"""vLLM as an engine: a server for each setting, asked as any client would."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from adaptspec.engines.inference_engine import (
    Answer,
    EngineOptions,
    InferenceEngine,
    Launch,
    Method,
)
from adaptspec.engines.openai_client import CompletionRequest, Reply
from adaptspec.engines.processes import ServerProcess, start_server
from adaptspec.errors import EngineError
from adaptspec.memory import usable_memory
from adaptspec.params import Params, Scalar
from adaptspec.profile import PLAIN, Environment
from adaptspec.workloads import Prompt
from adaptspec_plugins.engines.model_folder import EPSILON, ModelFolder
from adaptspec_plugins.engines.vllm.arguments import refuse_ours, without_memory_share
from adaptspec_plugins.engines.vllm.command import (
    BOUND,
    GIB,
    MEMORY_USED,
    Starting,
    cores_of,
    usable_cpus,
    visible_device,
)
from adaptspec_plugins.engines.vllm.counters import Counters, shared
from adaptspec_plugins.engines.vllm.installation import Installation
from adaptspec_plugins.engines.vllm.methods import Option, options_of
from adaptspec_plugins.engines.vllm.server import ERRORS, Server

SECONDS_TO_START = 1200.0  # large weights on a slow disk
ROOM = 4  # servers that are kept at most
# After its last answer a server looks for work without pause for so long (`busy_loop_s`
# of vLLM's shm_broadcast.py), on cores that another one would be measured on.
SECONDS_TO_REST = 1.0
# What its end, or the log of a server that didn't start, tells where memory was short.
# -9 is how vLLM tells of a process of its own that was killed.
SHORT_OF_MEMORY = re.compile(
    r"ended before it was ready.*(memory|alloc|KV cache|space left|': -9)",
    re.IGNORECASE,
)
# Rounding passes through every layer: a few units in the last place of the logits.
TIE_UNITS = 4


class VLLM(InferenceEngine):
    """vLLM of another environment, or of this one."""

    name = "vllm"
    summary = "vLLM's server, started with each setting"
    starting = 60.0

    def __init__(
        self,
        options: EngineOptions,
        starting: Starting,
        models: Mapping[str, ModelFolder | None],
        choices: tuple[dict[str, Option], dict[str, str]],
    ) -> None:
        self._options = options
        self._starting = starting
        self._target = starting.target
        self._draft = models["draft"]
        self._found, self._missing = choices
        self._servers: OrderedDict[str, Server] = OrderedDict()
        self._prompts: dict[Prompt, list[int]] = {}
        self._context: int | None = None  # of every server, as the last one told
        self._asked: tuple[Server, float] | None = None
        self.resting = SECONDS_TO_REST if starting.on_cpu else 0.0

    @classmethod
    def open(cls, options: EngineOptions) -> VLLM:
        """Look at the models' folders and the installation; nothing is started."""
        if options.concurrency < 1:
            raise EngineError(
                f"concurrency must be 1 or more, got {options.concurrency}"
            )
        if options.api_key is not None:
            raise EngineError("vllm: its server is started here and wants no key")
        if options.batch_threads is not None:
            raise EngineError(
                "vllm: it has one number of threads for all forwards; leave out "
                "--batch-threads"
            )
        refuse_ours(options.arguments)
        target = ModelFolder.find(options.model or _default_model())
        draft = ModelFolder.find(options.draft_model) if options.draft_model else None
        heads = [ModelFolder.find(folder) for folder in options.heads]
        installation = Installation.find(options)
        device = (options.device or installation.device).partition(":")[0]
        if device != installation.device:
            raise EngineError(
                f"this vLLM ({installation.version}) is built for "
                f"{installation.device}, got device {options.device!r}; install the "
                "other build, or leave out --device"
            )
        _ = visible_device(options)
        if options.threads is not None and installation.device != "cpu":
            raise EngineError(
                "threads are for vLLM's CPU build, this one is for "
                f"{installation.device}; leave out --threads"
            )
        drafters = [*heads, *([draft] if draft else [])]
        starting = Starting(
            options,
            installation,
            target,
            drafter_bytes=max((d.bytes for d in drafters), default=0),
            drafter_cache_bytes=draft.cache_bytes(1) if draft else 0,
            cores=cores_of(options) if installation.device == "cpu" else (),
        )
        choices = options_of(target, draft, heads, installation)
        return cls(options, starting, {"draft": draft}, choices)

    @property
    def environment(self) -> Environment:
        """Digests of the folders' files; versions of vLLM's own environment."""
        installation, draft = self._starting.installation, self._draft
        heads = [o.model for o in self._found.values() if o.model not in (None, draft)]
        digests = "".join(sorted(h.digest for h in heads if h))
        return Environment(
            model=self._target.digest,
            model_name=self._target.name,
            draft=draft.digest if draft else None,
            draft_name=draft.name if draft else None,
            dtype=self._starting.dtype,
            device=installation.device,
            device_name=_device_name(installation.device),
            threads=len(self._starting.cores),
            versions={
                "adaptspec": version("adaptspec"),
                "vllm": installation.version,
                **{
                    name: installation.packages[name]
                    for name in ("torch", "transformers", "python", "arctic-inference")
                    if name in installation.packages
                },
            },
            heads=hashlib.sha256(digests.encode()).hexdigest()[:16] if heads else None,
            heads_name=", ".join(h.name for h in heads if h) or None,
            configuration=self._configuration,
            engine=self.name,
            concurrency=self._options.concurrency,
        )

    @property
    def _configuration(self) -> str:
        """Of the model, and of what the user says to vLLM beside.

        The share of a GPU's memory is left out: it says how many tokens the server can
        hold, not how fast it answers as many requests as it has room for.
        """
        arguments = without_memory_share(self._options.arguments)
        told = [arguments, self._options.context]
        all_of_it = f"{self._target.configuration}{json.dumps(told)}"
        return hashlib.sha256(all_of_it.encode()).hexdigest()[:16]

    @property
    def methods(self) -> Sequence[Method]:
        """Those whose models and packages are at hand."""
        return [option.method for option in self._found.values()]

    @property
    def unavailable(self) -> Mapping[str, str]:
        """What each of the others needs."""
        return self._missing

    @property
    def room(self) -> int:
        """By free memory on a CPU; a server takes a whole GPU."""
        if not self._starting.on_cpu:
            return 1
        return max(1, min(ROOM, self._usable_bytes() // self._starting.bytes))

    def use_threads(self, threads: int, batch_threads: int) -> None:
        """On as many of the CPUs that this process may use; servers end that run on
        others."""
        # Nobody asked for this number: where there are fewer, all of them are meant.
        cores = cores_of(replace(self._options, threads=threads, runs_here=True))
        self.close()
        self._starting = replace(self._starting, cores=cores)

    def _usable_bytes(self) -> int:
        """Of memory, with what our servers hold already."""
        held = sum(server.memory for server in self._servers.values())
        return int((usable_memory() + held) * MEMORY_USED)

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        """All prompts at the same time, greedily, by token ids."""
        server = self._server(method, params)
        read = [self._ids(server, prompt) for prompt in prompts]
        requests = [
            self._request(prompt, ids, prompt.max_new_tokens or max_new_tokens)
            for ids, prompt in zip(read, prompts, strict=True)
        ]
        self._let_others_rest(server)
        try:
            before = server.counters()
            replies = server.ask(requests)
            told = server.counted(before, sum(reply.tokens for reply in replies))
        finally:
            self._asked = (server, time.monotonic())
        return _answers(replies, told)

    def near_tie(
        self, prompt: Prompt, tokens: Sequence[int], one: int, other: int
    ) -> bool | None:
        """By the plain server's logits at that place."""
        epsilon = EPSILON.get(self._starting.dtype)
        if epsilon is None:
            return None
        server = self._server(PLAIN, {})
        read = [*self._ids(server, prompt), *tokens]
        asked = {
            **self._greedy(read, 1),
            # A version that doesn't know the ids tells the 20 best.
            "logprobs": 20,
            "logprob_token_ids": sorted({one, other}),
            "return_tokens_as_token_ids": True,
        }
        self._let_others_rest(server)
        try:
            told = server.post("completions", asked)
        finally:
            self._asked = (server, time.monotonic())
        try:
            logits = told["choices"][0]["logprobs"]["top_logprobs"][0]
            first, second = (logits[f"token_id:{token}"] for token in (one, other))
        except (KeyError, IndexError, TypeError):
            return None
        size = max(abs(first), abs(second))
        return bool(abs(first - second) <= TIE_UNITS * epsilon * size)

    def launch(self, method: str, params: Mapping[str, Scalar]) -> Launch:
        """The command that was measured, and its speculative configuration."""
        option, read = self._setting(method, params)
        config = option.config(read)
        notes = [
            "vLLM has one setting for all requests, whatever their class.",
            "It was measured without prefix caching; leave out "
            "--no-enable-prefix-caching to serve prompts that begin alike.",
        ]
        notes.append(
            "--max-num-seqs is how many requests were measured at a time; raise it to "
            "serve more."
        )
        if self._options.context is not None:
            notes.append(
                "--max-model-len is the longest prompt with its answer that was "
                "measured; leave it out to serve as long ones as the model knows."
            )
        if method == "suffix":
            notes.append(
                "suffix_decoding_max_cached_requests 0 keeps no earlier answers, so "
                "that a measurement can't copy them; a larger value may gain more."
            )
            notes.append(
                "It needs the package arctic-inference==0.1.1, which vLLM doesn't "
                "bring and its published image lacks: for a container, build an image "
                "with both, and name it with --image."
            )
        variables = self._starting.variables()
        if BOUND in variables:
            fits = set(self._starting.cores) <= set(usable_cpus())
            whose = "this machine" if fits else "a machine with as many, not this one"
            notes.append(
                f"It is bound to the CPUs {variables[BOUND]} of {whose} ({BOUND}). "
                "Variables are as they are set here, or else as the models need them: "
                "set those again that were set otherwise for the tune."
            )
        installation = self._starting.installation
        others = [name for name in installation.not_its_own if name != "VIRTUAL_ENV"]
        if others:
            notes.append(
                f"It was measured without {' and '.join(others)}, set here for another "
                "Python; unset that to start this command."
            )
        return Launch(
            command=self._starting.command(config),
            environment=variables,
            config={"speculative_config": config} if config else {},
            notes=notes,
            path=[installation.programs],
        )

    def close(self) -> None:
        """End every server."""
        while self._servers:
            self._servers.popitem()[1].close()

    def _setting(
        self, method: str, params: Mapping[str, Scalar]
    ) -> tuple[Option, Params]:
        if method not in self._found:
            why = self._missing.get(method)
            known = ", ".join(self._found)
            raise EngineError(
                f"vllm: {method} {why}"
                if why
                else f"vllm has no method {method!r}; it has: {known}"
            )
        option = self._found[method]
        return option, option.method.Params.parse(params, method)

    def _server(self, method: str, params: Mapping[str, Scalar]) -> Server:
        option, read = self._setting(method, params)
        config = option.config(read)
        key = json.dumps(config, sort_keys=True)
        if key in self._servers and self._servers[key].ended:
            self._servers.pop(key).close()
        if key in self._servers:
            self._servers.move_to_end(key)
            return self._servers[key]
        self._refuse_what_never_fits()
        room = self.room
        while len(self._servers) >= room:
            self._servers.popitem(last=False)[1].close()
        try:
            process = self._start(method, config)
        except EngineError as error:
            if not self._servers or not SHORT_OF_MEMORY.search(str(error)):
                raise
            # It may be that it had no room beside the others.
            self.close()
            process = self._start(method, config)
        self._servers[key] = Server(process, self._target.given)
        return self._servers[key]

    def _start(self, method: str, config: Mapping[str, Any]) -> ServerProcess:
        variables = self._starting.installation.variables()
        return start_server(
            f"vllm ({method})",
            lambda port: self._starting.measured(config, port),
            deadline=SECONDS_TO_START,
            telling=ERRORS,
            environment={**variables, **self._starting.variables()},
        )

    def _refuse_what_never_fits(self) -> None:
        """The model's own longest context may need more memory than there is."""
        if not self._starting.on_cpu or self._options.context is not None:
            return
        needed, usable = self._starting.bytes, self._usable_bytes()
        if needed > usable:
            raise EngineError(
                f"vllm: {self._options.concurrency} x {self._starting.context} tokens, "
                "the longest that the model knows, take a server of "
                f"{needed / GIB:.0f} GiB, and {usable / GIB:.1f} GiB may be used; tell "
                "the longest prompt with its answer by --context"
            )

    def _let_others_rest(self, server: Server) -> None:
        """Wait until the server that was asked before another leaves the CPUs alone."""
        if self._asked is None:
            return
        before, at = self._asked
        if before is not server and not before.ended:
            time.sleep(max(0.0, at + self.resting - time.monotonic()))

    def _ids(self, server: Server, prompt: Prompt) -> list[int]:
        """The prompt as the server's own tokenizer and chat template read it."""
        if prompt not in self._prompts:
            self._prompts[prompt], self._context = server.encode(prompt)
        return self._prompts[prompt]

    def _request(
        self, prompt: Prompt, ids: Sequence[int], tokens: int
    ) -> CompletionRequest:
        # vLLM itself would cut the answer without a word.
        if self._context is not None and len(ids) + tokens > self._context:
            raise EngineError(
                f"vllm: prompt {prompt.id!r} has {len(ids)} tokens and may get "
                f"{tokens} more, but the context holds {self._context}; ask for "
                "fewer, or tell a longer context"
            )
        body = {**self._greedy(ids, tokens), "return_token_ids": True}
        return CompletionRequest("completions", {"model": self._target.given, **body})

    @staticmethod
    def _greedy(ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """A penalty may come from the model's generation_config.json."""
        return {
            "prompt": list(ids),
            "max_tokens": tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
        }


def _answers(replies: Sequence[Reply], told: Counters) -> list[Answer]:
    """With the counters, which are of all requests together, shared among them.

    The stream has a chunk for each forward, unless two came at once. What is accepted
    shows as tokens beyond one a chunk; what is rejected can't be seen, and is shared by
    the answers' lengths.
    """
    lengths = [max(0, reply.tokens - 1) for reply in replies]
    beyond = [
        max(0, length - max(0, reply.chunks - 1))
        for length, reply in zip(lengths, replies, strict=True)
    ]
    accepted = shared(told.accepted, beyond if any(beyond) else lengths)
    rejected = shared(told.proposed - told.accepted, lengths)
    return [
        Answer(
            text=reply.text,
            token_ids=reply.token_ids,
            tokens=reply.tokens,
            seconds=reply.seconds,
            seconds_to_first=reply.seconds_to_first,
            # Each forward gives a token beside those accepted, some of which may lie
            # behind the answer's end: both counts are too small at worst.
            forwards=max(length - taken, reply.chunks - 1, 0),
            proposed=taken + refused,
            accepted=taken,
        )
        for reply, length, taken, refused in zip(
            replies, lengths, accepted, rejected, strict=True
        )
    ]


def _default_model() -> str:
    from adaptspec.default_model import default_model_path

    return str(default_model_path())


def _device_name(device: str) -> str:
    if device == "cpu":
        import torch

        from adaptspec.environment import device_name

        return device_name(torch.device("cpu"))
    program = shutil.which("nvidia-smi")
    if program is None:
        return device
    asked = [program, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    names = list(dict.fromkeys(done.stdout.strip().splitlines()))
    return ", ".join(names) or device
