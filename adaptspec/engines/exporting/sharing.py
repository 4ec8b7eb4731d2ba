"""Several servers on one machine: how they share its memory and its cores."""

from __future__ import annotations

from dataclasses import replace

from adaptspec.engines.exporting.plan import Plan, Server

ALONE = (
    "Each setting was measured alone: servers on one machine share it when both are "
    "busy, and each holds the model."
)
VLLM_SHARE = "--gpu-memory-utilization"
VLLM_ALL = 0.92  # of the GPU's memory, which one server takes by itself
OWN_GPU = "start it with CUDA_VISIBLE_DEVICES"


def shared(plan: Plan, engine: str) -> Plan:
    """The plan with what its servers need to run beside each other.

    vLLM and SGLang take nearly all of a GPU, so a second server finds none left: vLLM's
    take equal shares of it. SGLang's share is of what is free when it starts, so no
    shares hold for servers that start together.
    """
    count = len(plan.servers)
    if count == 1:
        return plan
    notes = [*plan.notes, ALONE]
    servers, device = plan.servers, plan.found.environment.device
    if device == "cpu":
        notes.append(
            f"Each server has all {plan.found.environment.threads} threads that it was "
            "measured with: those that are busy at the same time slow each other down."
        )
    elif engine == "vllm" and not any(map(_tells_share, servers)):
        share = int(100 * VLLM_ALL / count) / 100
        servers = [_with_share(server, share) for server in servers]
        notes.append(
            f"The servers share one GPU ({VLLM_SHARE}), which leaves each less room "
            "for requests than was measured; each is started when the one before it is "
            f"ready. Where one has a GPU of its own, {OWN_GPU} and without that option."
        )
    elif engine in ("vllm", "sglang"):
        notes.append(
            "The servers don't divide a GPU's memory, so each needs a GPU of its own: "
            f"{OWN_GPU}."
        )
    elif engine == "llama.cpp":
        notes.append(
            "Each is started when the one before it is ready. Where the GPU hasn't "
            "room for all, llama-server leaves layers off it without an error (--fit), "
            "and is slower than was measured: its log says so."
        )
    # Both measure what memory is free while they start, and may end where another takes
    # some of it meanwhile.
    in_turn = engine == "vllm" or (engine == "llama.cpp" and device != "cpu")
    return replace(plan, servers=servers, notes=notes, one_by_one=in_turn)


def _tells_share(server: Server) -> bool:
    """Whether the tune was told a share, which holds for its servers, too."""
    options = (word.partition("=")[0] for word in server.launch.command)
    return any(option.replace("_", "-") == VLLM_SHARE for option in options)


def _with_share(server: Server, share: float) -> Server:
    """The server with a part of the GPU's memory."""
    command = [*server.launch.command, VLLM_SHARE, f"{share:g}"]
    return replace(server, launch=replace(server.launch, command=command))
