"""llama.cpp, measured through the ``llama-server`` processes that it starts."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptspec.engines.inference_engine import (
    PLAIN_METHOD,
    Answer,
    EngineOptions,
    InferenceEngine,
    Launch,
    Method,
)
from adaptspec.errors import EngineError
from adaptspec.memory import usable_memory
from adaptspec.params import Scalar
from adaptspec_plugins.engines.llama_cpp.arguments import give_template, refuse_ours
from adaptspec_plugins.engines.llama_cpp.devices import elsewhere, family, named, used
from adaptspec_plugins.engines.llama_cpp.gguf_file import GgufFile
from adaptspec_plugins.engines.llama_cpp.memory import (
    OTHER_BYTES,
    SHORT_OF_MEMORY,
    refuse_what_never_fits,
    way_to_less,
)
from adaptspec_plugins.engines.llama_cpp.processors import (
    usable_cores,
    usable_processors,
)
from adaptspec_plugins.engines.llama_cpp.program import Program, dropped_variables
from adaptspec_plugins.engines.llama_cpp.server import LlamaServer
from adaptspec_plugins.engines.llama_cpp.settings import (
    all_methods,
    arguments_of,
    kinds_of,
    missing_options,
    uses_draft,
)

if TYPE_CHECKING:
    from adaptspec.profile import Environment
    from adaptspec.workloads import Prompt

ROOM = 8
MEMORY_USED = 0.7  # of what is free
BLOCK = 256  # llama.cpp rounds a slot's tokens up to multiples of it
# Two forwards of the same tokens in other batches: see docs/engines/llama-cpp.md.
TIE_NATS = {"float32": 0.1, "float16": 0.25, "bfloat16": 0.25}
TIE_NATS_QUANTISED = 0.5
TIE_TOKENS = 16


class LlamaCpp(InferenceEngine):
    """``llama-server`` with one process for each setting."""

    name = "llama.cpp"
    summary = "llama.cpp's llama-server, with GGUF files"
    starting = 3.0

    def __init__(
        self,
        options: EngineOptions,
        program: Program,
        model: GgufFile,
        draft: GgufFile | None,
    ) -> None:
        self._options = options
        self._program = program
        self._model = model
        self._draft = draft
        self._has_template = model.has_template or give_template(options.arguments)
        self._devices = list(program.devices)
        if not options.runs_here:
            self._devices += elsewhere(options.device, program.devices)
        self._device = named(options.device, self._devices)
        self._threads = options.threads or usable_cores()
        self._batch_threads = options.batch_threads or self._threads
        self._servers: OrderedDict[tuple[str, ...], LlamaServer] = OrderedDict()
        self._encoded: dict[Prompt, list[int]] = {}
        self._largest = 0  # bytes that a server was seen to hold
        self._fitting = ROOM  # servers, as far as was seen
        known = all_methods()
        self._lacking = {
            name: reason for name in known if (reason := self._lacks(name))
        }
        self._methods = [m for n, m in known.items() if n not in self._lacking]

    @classmethod
    def open(cls, options: EngineOptions) -> LlamaCpp:
        """See :meth:`InferenceEngine.open`; no server is started yet."""
        _refuse_what_does_not_apply(options)
        program = Program.find(options.command)
        assert options.model is not None
        model = GgufFile.open(options.model)
        draft = GgufFile.open(options.draft_model) if options.draft_model else None
        return cls(options, program, model, draft)

    def _lacks(self, method: str) -> str | None:
        """Why a method can't be tried here, or None."""
        needed = uses_draft(method)
        if needed == "draft_mtp" and self._model.predicts_ahead:
            needed = None
        if needed:
            if self._draft is None:
                what = "or a model file with such layers" if "mtp" in needed else ""
                return f"it needs a draft model: --draft-model FILE.gguf {what}".strip()
            if self._draft.draft_kind != needed:
                return (
                    f"{self._draft.path.name} is of architecture "
                    f"{self._draft.architecture}, which drafts as "
                    f"{self._draft.draft_kind}"
                )
        if missing := missing_options(
            method, self._program.options, self._program.spec_types
        ):
            return (
                f"this llama-server ({self._program.version}) lacks "
                f"{', '.join(missing)}"
            )
        return None

    @property
    def environment(self) -> Environment:
        """What a measurement holds for, by the files and the machine."""
        import torch

        from adaptspec._version import __version__
        from adaptspec.environment import device_name
        from adaptspec.profile import Environment

        device, processor = "cpu", device_name(torch.device("cpu"))
        if accelerators := self._accelerators():
            device = family(accelerators[0][0])
            processor = ", ".join(dict.fromkeys(told for _, told in accelerators))
        arguments = json.dumps(list(self._options.arguments)).encode()
        return Environment(
            model=self._model.digest,
            model_name=self._model.name,
            draft=self._draft.digest if self._draft else None,
            draft_name=self._draft.name if self._draft else None,
            dtype=self._model.dtype,
            device=device,
            device_name=processor,
            threads=self._threads,
            versions={"adaptspec": __version__, self.name: self._program.version},
            # What the user's own arguments change isn't known, so they are compared.
            configuration=hashlib.sha256(arguments).hexdigest()[:16],
            engine=self.name,
            concurrency=self._options.concurrency,
        )

    def _accelerators(self) -> Sequence[tuple[str, str]]:
        """Those that hold layers, as far as options tell."""
        return used(self._device, self._options.arguments, self._devices)

    @property
    def methods(self) -> Sequence[Method]:
        """Those that this version has and that the model files are for."""
        return self._methods

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Method -> why it can't be tried here; a combination's reason is told once."""
        return {
            name: reason
            for name, reason in self._lacking.items()
            if len(kinds_of(name)) == 1
        }

    @property
    def room(self) -> int:
        """Servers that the free memory holds; one on an accelerator."""
        if self._accelerators():
            return 1
        files = [file for file in (self._model, self._draft) if file is not None]
        weights = sum(file.size for file in files)  # mapped once for all servers
        tokens = self._slot_tokens() or self._model.number("context_length")
        slots = self._options.concurrency
        each = OTHER_BYTES + sum(file.cache_bytes(tokens * slots) for file in files)
        held = [server.process.memory() for server in self._servers.values()]
        self._largest = max([self._largest, *held])
        free = usable_memory() + sum(held) - weights
        fit = int(free * MEMORY_USED) // max(each, self._largest)
        return max(1, min(self._fitting, fit))

    @property
    def thread_counts(self) -> Sequence[int]:
        """Physical cores first, then processors and half of the cores."""
        told = self._options.threads or self._options.batch_threads
        if told or self._accelerators():
            return ()
        counts = [usable_cores(), usable_processors(), usable_cores() // 2]
        return [n for n in dict.fromkeys(counts) if n > 0]

    def use_threads(self, threads: int, batch_threads: int) -> None:
        """With ``-t`` and ``-tb``: servers that run with others stay until they make
        room."""
        self._threads, self._batch_threads = threads, batch_threads

    def _slot_tokens(self) -> int | None:
        """Of one request, as llama.cpp counts them; None: the model's own."""
        if self._options.context is None:
            return None
        return -(-(self._options.context + 2) // BLOCK) * BLOCK

    def answer(
        self,
        method: str,
        params: Mapping[str, Scalar],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> list[Answer]:
        """See :meth:`InferenceEngine.answer`."""
        if len(prompts) > self._options.concurrency:
            raise EngineError(
                f"llama.cpp: {len(prompts)} prompts at the same time need as many "
                f"slots, got a concurrency of {self._options.concurrency}"
            )
        if not prompts:
            return []
        kinds = kinds_of(method)
        server = self._server(method, params)
        told = []
        for prompt in prompts:
            ids = self._encode(server, prompt)
            length = prompt.max_new_tokens or max_new_tokens
            if len(ids) + length + 1 > server.context:
                raise EngineError(
                    f"llama.cpp: prompt {prompt.id!r} has {len(ids)} tokens and may "
                    f"get {length} more, but a slot holds {server.context}; ask for "
                    "fewer, or tell a longer context"
                )
            told.append((ids, length))
        asked = {tuple(ids) for ids, _ in told}
        if any(kind.keeps for kind in kinds) and not asked.isdisjoint(server.answered):
            # There is no request that empties the tables of n-grams.
            self._servers.pop(tuple(self._command(method, params))).stop()
            server = self._server(method, params)
        server.answered |= asked
        return server.answer(told, forget=any(kind.forgets for kind in kinds))

    def _encode(self, server: LlamaServer, prompt: Prompt) -> list[int]:
        if prompt not in self._encoded:
            self._encoded[prompt] = server.encode(prompt, self._has_template)
        return self._encoded[prompt]

    def _server(self, method: str, params: Mapping[str, Scalar]) -> LlamaServer:
        """The server of a setting, started where none runs."""
        command = self._command(method, params)
        key = tuple(command)
        server = self._servers.get(key)
        if server and server.process.ended:
            self._servers.pop(key).stop()
            server = None
        if server is None:
            self._refuse_what_never_fits(method)
            while self._servers and len(self._servers) >= self.room:
                self._servers.popitem(last=False)[1].stop()
            self._servers[key] = server = self._start(method, command)
        self._servers.move_to_end(key)
        return server

    def _start(self, method: str, command: Sequence[str]) -> LlamaServer:
        """A new server; without those beside which it finds too little memory."""
        if "--cache-ram" in self._program.options:
            command = [*command, "--cache-ram", "0"]
        # Reading a file that isn't in memory takes a second per 100 MB at worst.
        deadline = 120 + self._model.size / 1e8
        slots, speculates = self._options.concurrency, bool(kinds_of(method))
        while True:
            try:
                return LlamaServer.start(command, slots, speculates, deadline)
            except EngineError as error:
                if not SHORT_OF_MEMORY.search(str(error)):
                    raise
                if not self._servers:
                    way_out = way_to_less(self._options, self._model)
                    raise EngineError(f"{error}; {way_out}") from error
                self._fitting = len(self._servers)
                self.close()

    def _refuse_what_never_fits(self, method: str) -> None:
        if not self._accelerators():
            held = sum(server.process.memory() for server in self._servers.values())
            fits = "--fit" in self._program.options
            refuse_what_never_fits(self._options, self._files(method), fits, held)

    def _files(self, method: str) -> list[GgufFile]:
        """The model's, and the draft model's where a method takes it."""
        # A model that predicts ahead itself takes no draft model of another kind.
        draft = self._draft
        if draft is None or draft.draft_kind != uses_draft(method):
            return [self._model]
        return [self._model, draft]

    def _command(self, method: str, params: Mapping[str, Scalar]) -> list[str]:
        """What starts a setting, without address and port."""
        if method in self._lacking:
            raise EngineError(
                f"llama.cpp: {method} isn't available: {self._lacking[method]}"
            )
        slots = self._options.concurrency
        command = [self._program.command, "-m", str(self._model.path)]
        command += ["-t", str(self._threads), "-tb", str(self._batch_threads)]
        command += ["-np", str(slots)]
        if (tokens := self._slot_tokens()) is not None:
            command += ["-c", str(tokens * slots)]
        if self._device is not None:
            command += ["--device", self._device]
        command += arguments_of(method, params)
        for draft in self._files(method)[1:]:
            command += ["-md", str(draft.path)]
        return command + list(self._options.arguments)

    def near_tie(
        self, prompt: Prompt, tokens: Sequence[int], one: int, other: int
    ) -> bool | None:
        """By the probabilities after ``tokens``: both close to the highest."""
        server = self._server(PLAIN_METHOD.name, {})
        ids = [*self._encode(server, prompt), *tokens]
        if len(ids) + 2 > server.context:
            return None
        found = server.most_probable(ids, TIE_TOKENS)
        within = TIE_NATS.get(self._model.dtype, TIE_NATS_QUANTISED)
        least = max(found.values()) - within
        return all(found.get(token, -1e9) >= least for token in (one, other))

    def launch(self, method: str, params: Mapping[str, Scalar]) -> Launch:
        """The command that was measured; a user adds ``--host`` and ``--port``."""
        notes = ["one setting holds for all requests: none can ask for another"]
        if "--cache-ram" in self._program.options:
            notes.append(
                "measured with `--cache-ram 0` and `cache_prompt: false`, so that no "
                "prompt was read from memory; serving needs neither"
            )
        notes.append(
            "-np is how many requests were measured at a time; raise it to serve more"
        )
        if self._options.context is not None:
            notes.append(
                "-c is the context of the longest request that was measured, for each "
                "of -np; raise it to serve more or longer ones"
            )
        notes += [k.in_service for k in kinds_of(method) if k.in_service]
        if dropped := dropped_variables():
            notes.append(
                f"measured without the variables {', '.join(dropped)}, which are set "
                "here; unset them to start this command"
            )
        return Launch(command=self._command(method, params), notes=notes)

    def close(self) -> None:
        """End every server."""
        while self._servers:
            self._servers.popitem()[1].stop()


def _refuse_what_does_not_apply(options: EngineOptions) -> None:
    """Raise for what would be ignored.

    Raises:
        EngineError: naming it and the way out.
    """
    if options.model is None:
        raise EngineError("llama.cpp: it needs a model: --model FILE.gguf")
    if options.dtype != "auto":
        raise EngineError(
            f"llama.cpp: a GGUF file has its own type, so dtype={options.dtype!r} "
            "can't be told; convert the file with llama-quantize"
        )
    if options.heads:
        raise EngineError(
            "llama.cpp: it takes trained heads (EAGLE-3, MTP, DFlash) as a GGUF file: "
            "--draft-model FILE.gguf"
        )
    if options.python is not None:
        raise EngineError("llama.cpp: it runs without Python; use --engine-command")
    if options.api_key is not None:
        raise EngineError("llama.cpp: its server is started here and wants no key")
    if options.concurrency < 1:
        raise EngineError(
            f"llama.cpp: concurrency >= 1 must hold, got {options.concurrency}"
        )
    refuse_ours(options.arguments)
