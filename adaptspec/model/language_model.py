"""A causal language model as the decoding core uses it: forward passes over trees."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from adaptspec.acceleration.attention import use_our_attention
from adaptspec.acceleration.compiled import compile_parts
from adaptspec.acceleration.layers import fuse_layers
from adaptspec.acceleration.linear import LinearReport, accelerate_linears
from adaptspec.errors import ModelLoadError, NoHiddenStatesError
from adaptspec.model import miniature
from adaptspec.model.cache import TreeCache
from adaptspec.model.capability import probe
from adaptspec.model.fixed_shapes import WIDTHS, FixedShapes, Rung, Shapes
from adaptspec.model.forked import heed_fork
from adaptspec.model.forward import Capability, Forward, PlainCache
from adaptspec.model.forward_times import LatencyCurve, measure_latency
from adaptspec.model.masks import (
    Reach,
    causal_mask,
    layer_reaches,
    positions,
    tree_mask,
)
from adaptspec.model.module_state import ModuleState
from adaptspec.model.offloaded import device_of
from adaptspec.model.prompts import Prompt, encode_prompt
from adaptspec.model.rotary import (
    context_length,
    depth_limit,
    forget,
    growing_rotations,
    reread_boundaries,
)
from adaptspec.model.same_bits import what_differs
from adaptspec.model.shape_ladder import settle_shapes
from adaptspec.model.verifiable import unverifiable
from adaptspec.model.views import (
    accepted_arguments,
    drops,
    replaced_layers,
    snapshot,
    unfit,
    unwrapped,
    view_of,
)
from adaptspec.model.vocabulary import vocabulary_mismatch
from adaptspec.model.weights import (
    _use_masked_attention,
    configuration_digest,
    weights_digest,
)
from adaptspec.token_tree import TokenTree
from adaptspec.turns import turns_of

if TYPE_CHECKING:
    from adaptspec.heads.protocol import TrainedHeads


# Long prompts are read in parts of so many tokens: what a layer computes of a part, and
# its mask, take room in proportion. Attention within a part computes what its mask
# leaves out, so that prompts of a few parts only are read faster at once. A GPU needs
# larger parts to be busy.
PART_TOKENS, CUDA_PARTS = 512, 8
FEW_PARTS = 4
# The tree that decoder layers are recognised by, and a position far from the first.
LOOK_PARENTS, FAR_POSITION = (-1, 0, 0, 1, 2), 4096


# Found out once, and again where the caller changes the model.
KNOWN_OF_A_MODEL = (
    *("capability", "unverifiable", "rounding", "latency", "reaches", "input_size"),
    "rereads",
)


class LanguageModel:
    """A causal LM and its tokenizer, run through the model's own ``forward``.

    The caller's module is never changed: the engine runs a copy of its module tree that
    shares the parameters, in which Linear layers are replaced by faster ones.

    Args:
        model: Any ``AutoModelForCausalLM``.
        tokenizer: Its tokenizer; None restricts prompts to token ids.
        name: What people call it.
        own_weights: True if nobody else uses ``model``: it is then changed in place
            and its weights may be repacked, so that none are held twice.
        accelerate: False runs Linear layers and attention as they are.
        shapes: Of forwards that verify. ``auto``: on CUDA few fixed ones, each captured
            as a graph where that gives what eager forwards do; elsewhere dynamic.
            ``fixed``: the same without graphs, on any device. ``dynamic``: each
            forward's own. See :attr:`shapes` for what came of it.
        compile: Norms and MLPs run as ``torch.compile`` makes them, in place of our
            Linear and decoder layers. The first load waits for it.

    Raises:
        ModelLoadError: if it can't be decoded or compiled, ``tokenizer`` is no
            tokenizer, or ``shapes`` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        name: str | None = None,
        *,
        own_weights: bool = False,
        accelerate: bool = True,
        shapes: Shapes = "auto",
        compile: bool = False,
    ) -> None:
        if shapes not in get_args(Shapes):
            raise ModelLoadError(
                f"shapes must be one of {', '.join(get_args(Shapes))}, got {shapes!r}"
            )
        if tokenizer is not None and (
            isinstance(tokenizer, type)
            or not (callable(tokenizer) and hasattr(tokenizer, "decode"))
        ):
            name = tokenizer if isinstance(tokenizer, str) else "..."
            raise ModelLoadError(
                f"tokenizer must be a loaded one, got {tokenizer!r:.80}; pass "
                f"AutoTokenizer.from_pretrained({name!r})"
            )
        model = unwrapped(model)
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_output_embeddings"):
            raise ModelLoadError(
                "a transformers causal language model is expected, "
                f"got {type(model).__name__}"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ModelLoadError(
                f"{type(model).__name__} is an encoder-decoder; only decoder-only "
                "models are supported"
            )
        self.source = model
        # Taken around each step, whoever decodes with the model.
        self.turns = turns_of(model)
        self.tokenizer: Any = tokenizer
        self.name = name or getattr(config, "_name_or_path", "") or type(model).__name__
        # Turned off by the probe for models that build masks of their own only.
        self.use_masks = True
        # Kind -> the trained heads that draft from this model's hidden states.
        self.heads: dict[str, TrainedHeads] = {}
        self._own_weights, self._accelerate = own_weights, accelerate
        self.asked_shapes = shapes
        self.compile = compile
        self._build()

    def _build(self) -> None:
        """What decoding runs, made from ``source`` as it is now."""
        model: Any = self.source
        heed_fork(next(model.parameters()).device)
        if problem := unfit(model):
            raise ModelLoadError(f"{self.name} {problem}")
        seen = None if self._own_weights else snapshot(model)
        self.config = model.config.get_text_config(decoder=True)
        self.generation_config = getattr(model, "generation_config", None)
        self.device, self.dtype = device_of(model), _dtype_of(model)
        self.vocab_size = _vocab_size(model, self.config)
        self.digest = weights_digest(model)
        # Before any forward: buffers of growing rotations change with what is decoded.
        self.configuration = configuration_digest(model)
        self.head_share = _head_share(model)
        # Packed weights are no parameters.
        self.parameter_count = sum(p.numel() for p in model.parameters())
        self.linear = LinearReport(0, "unchanged")
        # Settled with `shapes`, where forwards have fixed ones.
        self.fixed: FixedShapes | None = None
        self._rung: Rung | None = None
        self.model: nn.Module = model if self._own_weights else view_of(model)
        # A module that couldn't be copied is the caller's, and stays as it is.
        if self._own_weights or self.model is not model:
            _use_masked_attention(self.model)
            if self._own_weights:
                self.model.eval()
            # Where activations are rounded, what rounding our kernels do moves more.
            if self._accelerate and replaced_layers(self.model):
                self.__dict__["unverifiable"] = unverifiable(self.over(self.model))
            if self._accelerate and self.__dict__.get("unverifiable") is None:
                use_our_attention(self.model)
                if not self.compile:
                    self.linear = accelerate_linears(
                        self.model, own_weights=self._own_weights
                    )
        elif drops(model):
            raise ModelLoadError(
                f"{self.name} drops activations at random, since it is in training "
                "mode, and can't be copied; call its eval() first"
            )
        names = accepted_arguments(self.model)
        self.takes_positions = "position_ids" in names
        self._takes_keep = "logits_to_keep" in names
        # The name changed in transformers 5.24; state-space models have their own.
        self.cache_argument = next(
            (n for n in ("cache", "past_key_values", "cache_params") if n in names),
            "past_key_values",
        )
        self._layers = int(self.config.num_hidden_layers)
        self._growing = growing_rotations(self.model)
        self._state = ModuleState(self.model, self.name)
        self.fused = 0  # decoder layers that run as one operation
        self.compiled = 0  # norms and MLPs that run compiled
        if self.compile:
            self.compiled = self._compile()
        elif self._accelerate and (self._own_weights or self.model is not model):
            self.fused = fuse_layers(self.model, self._look)
        self._seen = seen

    def _compile(self) -> int:
        """Compile what can be; refused where nothing is, or rounding moves too much."""
        if not self._accelerate:
            raise ModelLoadError(
                "compile=True replaces modules, which accelerate=False forbids; leave "
                "out one"
            )
        if (why := self.__dict__.get("unverifiable")) is not None:
            raise ModelLoadError(
                f"{self.name} can't be compiled: {why}; leave compile out"
            )
        if not self._own_weights and self.model is self.source:
            raise ModelLoadError(
                f"{self.name} can't be copied, so compile=True would change the "
                "caller's module; leave compile out or load it by its folder"
            )
        if not (count := compile_parts(self.model, self._look)):
            raise ModelLoadError(
                f"{self.name} can't be compiled: no norm or MLP was found that then "
                "gives the same; leave compile out"
            )
        return count

    def follow(self) -> bool:
        """Take over what the caller has changed in a model of his since: adapters,
        weights, embeddings, hooks. Done before each generation.

        Returns:
            Whether anything had changed; capability, digest and sizes may have, too.

        Raises:
            ModelLoadError: if it can't be decoded any more.
        """
        if self._seen is None or snapshot(self.source) == self._seen:
            return False
        for name in KNOWN_OF_A_MODEL:
            self.__dict__.pop(name, None)
        self.use_masks = True
        self._seen = ()  # equals no snapshot: what is interrupted is done again
        self._build()
        return True

    def evaluate(self, **arguments: Any) -> Any:
        """The module's forward, called with the state that belongs to the cache among
        ``arguments`` (without one, with that of a new sequence)."""
        if not self._state.settled:
            self._state.learn(self._trial())
        with self._state.of(arguments.get(self.cache_argument)):
            return self.model(**arguments)

    @torch.inference_mode()
    def _trial(self) -> Iterator[None]:
        """Passes over one sequence: a few tokens, then one by one."""
        cache, start = self.plain_cache(uncached=False).inner, 0
        for count in (3, 1, 1):
            arguments: dict[str, Any] = {
                "input_ids": torch.ones((1, count), dtype=torch.long).to(self.device),
                self.cache_argument: cache,
                "use_cache": True,
            }
            if self.takes_positions:
                arguments["position_ids"] = positions(range(count), start, self.device)
            self.model(**arguments)
            start += count
            yield

    @torch.inference_mode()
    def _look(self) -> None:
        """A few tokens behind others, at the first positions and at the last."""
        tree = TokenTree([1, 2, 3, 2, 1], LOOK_PARENTS)
        last = max(len(tree), (self.max_length or FAR_POSITION) - 2 * len(tree))
        cache = self.new_cache()
        self.prefill(tree.tokens, cache)
        for position in (len(tree), last):
            mask = self._masks(
                lambda reach: tree_mask(
                    tree, cache.length, reach, self.dtype, self.device
                )
            )
            ids = torch.tensor([tree.tokens], device=self.device)
            places = positions(tree.depths, position, self.device)
            self._run(ids, places, cache, mask, [0], ())
        self._forget_rotation()

    @functools.cached_property
    def capability(self) -> Capability:
        """Probed once: trees, else chains, else plain decoding, each compared with
        the model's own ``generate``.

        What is found holds from then on, so a caller's ``torch.autocast`` is left out.

        Raises:
            ModelLoadError: if it isn't causal, or nothing agrees with ``generate``.
        """
        with torch.autocast(self.device.type, enabled=False):
            return probe(self)

    @functools.cached_property
    def unverifiable(self) -> str | None:
        """Why passes over drafts aren't what the model gives without, or None."""
        return unverifiable(self)

    @property
    def shapes(self) -> Rung:
        """How forwards of decoding run; found out once, behind :attr:`capability`.

        On CUDA graphs are tried, then fixed shapes without, then dynamic ones: the
        first that gives what dynamic shapes give. Its reason says why it isn't more.
        """
        if self._rung is None:
            asked = self.asked_shapes
            self.fixed, self._rung = settle_shapes(self, self._run, asked)
        return self._rung if self.fixed is None else self.fixed.rung

    @functools.cached_property
    def rounding(self) -> str:
        """In which passes logits have other bits than token by token; "" if in none.

        A few forwards, run where somebody asks. In half precision so few hide most of
        what rounds otherwise, so a float32 miniature is looked at, too.
        """
        level = self.capability.level
        _ = self.shapes  # settled first: passes are then those of decoding
        found = what_differs(self, level)
        if found or level == "plain" or self.dtype is torch.float32:
            return found
        if (small := miniature.build(self.model, self.config)) is None:
            return ""
        twin = LanguageModel(
            small,
            own_weights=True,
            accelerate=self._accelerate,
            compile=self.compile,
        )
        twin.use_masks = self.use_masks
        found = what_differs(twin, level)
        return found and f"in a small float32 model of its class {found}"

    @functools.cached_property
    def latency(self) -> LatencyCurve:
        """Seconds of a verification forward by its number of tokens, measured once."""
        return measure_latency(self)

    @functools.cached_property
    def reaches(self) -> dict[str, Reach]:
        """Layer type -> how far it attends; empty where that isn't known."""
        try:
            return layer_reaches(self.config)
        except (ValueError, RuntimeError):  # unknown, or different in every layer
            return {}

    def attach(self, heads: TrainedHeads) -> None:
        """Let strategies draft with ``heads``, in place of others of their kind."""
        self.heads[heads.kind] = heads

    @property
    def head_size(self) -> int:
        """Numbers in a hidden state as the LM head reads it."""
        head = self.source.get_output_embeddings()  # type: ignore[operator]
        # Of a packed or quantised head the weight's shape says something else.
        if size := getattr(head, "in_features", None):
            return int(size)
        weight = getattr(head, "weight", None)
        if isinstance(weight, torch.Tensor):
            return int(weight.shape[1])
        return int(self.config.hidden_size)

    @functools.cached_property
    def input_size(self) -> int:
        """How many token ids the model can read: the rows of its embedding."""
        table = self.source.get_input_embeddings()  # type: ignore[operator]
        rows = getattr(table, "num_embeddings", None)
        return int(self.vocab_size if rows is None else rows)

    @property
    def max_length(self) -> int | None:
        """Most positions the model was made for, None if it doesn't say.

        Rotary scalings that reach beyond ``max_position_embeddings`` are counted.
        """
        return context_length(self.config)

    @functools.cached_property
    def rereads(self) -> frozenset[int]:
        """Numbers of cached tokens at which ``generate`` reads the whole text again."""
        return reread_boundaries(self)

    def over(self, module: nn.Module) -> LanguageModel:
        """A model over another module of ours, which is run as it is."""
        return LanguageModel(
            module, own_weights=True, accelerate=False, shapes="dynamic"
        )

    def new_cache(self, capacity: int = 0) -> TreeCache:
        """An empty cache with room for ``capacity`` tokens.

        Once it is known what the model verifies, and where shapes are fixed, it is one
        of few whose buffers stay.
        """
        if "capability" in self.__dict__ and self.shapes.kind != "dynamic":
            assert self.fixed is not None
            if (leased := self.fixed.lease(capacity)) is not None:
                return leased
        return TreeCache(self._layers, capacity)

    def plain_cache(self, uncached: bool | None = None) -> PlainCache:
        """The model's own cache, for models whose state can't be rolled back.

        Args:
            uncached: Keep the text instead; default: as the model's capability says.
        """
        from transformers import DynamicCache

        if self.capability.uncached if uncached is None else uncached:
            return PlainCache(None, text=[])
        return PlainCache(DynamicCache(config=self.config))

    def read_alone(
        self, tokens: Sequence[int], *, hidden_layers: Sequence[int] = ()
    ) -> Forward:
        """:meth:`prefill` of ``tokens`` with nothing before them, in a new cache."""
        plain = self.capability.level == "plain"
        cache = self.plain_cache() if plain else self.new_cache(len(tokens))
        return self.prefill(tokens, cache, hidden_layers=hidden_layers)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[int],
        cache: TreeCache | PlainCache,
        *,
        last: int = 1,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """Append ``tokens`` as a plain continuation; logits of the ``last`` of them.

        Rows are keyed by index into ``tokens``; hidden states cover all of them. Long
        prompts are read in parts where that gives what one forward would.
        """
        cached = cache.length
        count = len(tokens)
        if isinstance(cache, PlainCache):
            if cache.text is not None:
                return self._read_anew(tokens, cache, last, hidden_layers)
            return self._read_part(tokens, cache, last, hidden_layers)
        cache.announce(cached + count)
        if cached and self.fixed is not None and count <= WIDTHS[-1]:
            return self._append(tokens, cache, last, hidden_layers)
        forward = self._read_tokens(tokens, cache, last, hidden_layers)
        if self.fixed is not None:
            self.fixed.prepare(cache, hidden_layers)
        return forward

    def _read_tokens(
        self,
        tokens: Sequence[int],
        cache: TreeCache,
        last: int,
        hidden_layers: Sequence[int],
    ) -> Forward:
        """:meth:`prefill` of many tokens, in parts where that may be."""
        cached, count = cache.length, len(tokens)
        size = PART_TOKENS * (CUDA_PARTS if self.device.type == "cuda" else 1)
        # Without the argument, a forward makes logits of all that it reads.
        few = size * (FEW_PARTS if self._takes_keep else 1)
        if count <= few or not self._reads_in_parts(cached + count):
            return self._read_part(tokens, cache, last, hidden_layers)
        first = max(0, count - last)
        logits: list[torch.Tensor] = []
        states: dict[int, list[torch.Tensor]] = {layer: [] for layer in hidden_layers}
        for start in range(0, count, size):
            part = tokens[start : start + size]
            wanted = start + len(part) - first
            forward = self._read_part(part, cache, max(1, wanted), hidden_layers)
            if wanted > 0:
                logits.append(forward.logits)
            for layer in hidden_layers:
                states[layer].append(forward.hidden[layer])
        return Forward(
            torch.cat(logits),
            {node: node - first for node in range(first, count)},
            {layer: torch.cat(parts) for layer, parts in states.items()},
        )

    def reread(
        self,
        tokens: Sequence[int],
        cache: TreeCache | PlainCache,
        hidden_layers: Sequence[int] = (),
    ) -> Forward:
        """Fill ``cache`` again, with the whole text; what comes out at its last token.

        As ``generate`` does where a rotation switches, see :attr:`rereads`. The result
        is that of a root alone: row 0.
        """
        if isinstance(cache, TreeCache):
            cache.truncate(0)
        else:
            fresh = self.plain_cache()
            cache.inner, cache.length, cache.text = fresh.inner, 0, fresh.text
        forward = self.prefill(tokens, cache, hidden_layers=hidden_layers)
        hidden = {layer: states[-1:] for layer, states in forward.hidden.items()}
        return Forward(forward.logits[-1:], {0: 0}, hidden)

    @torch.inference_mode()
    def forward_tree(
        self, tree: TokenTree, cache: TreeCache, *, hidden_layers: Sequence[int] = ()
    ) -> Forward:
        """Append the tree's nodes to ``cache``; logits at every node but unread ones.

        The caller keeps a path afterwards with ``cache.keep``.
        """
        if self.fixed is not None:
            fixed = self.fixed.forward(tree, cache, hidden_layers=hidden_layers)
            if fixed is not None:
                return fixed
        cached, nodes = cache.length, len(tree)
        cache.announce(cached + nodes)
        mask: Any = None
        # On the CPU a lone root gets its mask too: attention then runs the same kernel
        # as for a draft, and gives the same bits (measured, bfloat16 included).
        if nodes > 1 or self.device.type == "cpu" or self._limited(cached + 1):
            mask = self._masks(
                lambda reach: tree_mask(tree, cached, reach, self.dtype, self.device)
            )
        return self._run(
            torch.tensor([list(tree.tokens)], device=self.device),
            positions(tree.depths, cached, self.device),
            cache,
            mask,
            # The LM head, too, may be faster for a few rows.
            [node for node in range(nodes) if node not in tree.unread],
            hidden_layers,
        )

    @torch.inference_mode()
    def extend(self, tree: TokenTree, cache: TreeCache, done: int) -> Forward:
        """Append the nodes from ``done`` on; the ones before are the cache's last rows.

        For drafting a tree level by level. Logits come at the new nodes.
        """
        if self.fixed is not None:
            fixed = self.fixed.forward(tree, cache, done)
            if fixed is not None:
                return fixed
        nodes = len(tree)
        cached, new = cache.length - done, nodes - done
        cache.announce(cached + nodes)
        masks = self._masks(
            lambda reach: tree_mask(tree, cached, reach, self.dtype, self.device)[
                :, :, done:
            ]
        )
        forward = self._run(
            torch.tensor([list(tree.tokens[done:])], device=self.device),
            positions(tree.depths[done:], cached, self.device),
            cache,
            masks,
            range(new),
            (),
        )
        return Forward(forward.logits, {done + row: row for row in range(new)})

    @torch.inference_mode()
    def extend_batch(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        *,
        hidden_layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Append ``tokens [batch, new]`` to several sequences padded on the left.

        Not for verification: nothing here is compared with plain decoding.

        Args:
            mask: ``[batch, cached + new]``, 0 at padding.
            cache: From :meth:`new_cache`, or a model's own, of this batch.

        Returns:
            Logits ``[batch, vocab]`` and, by layer, hidden states ``[batch, hidden]``,
            both at the last column.
        """
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": mask,
            self.cache_argument: cache,
            "use_cache": True,
        }
        if self.takes_positions:
            places = (mask.cumsum(1) - 1).clamp_min(0)
            arguments["position_ids"] = places[:, -tokens.shape[1] :]
        if self._takes_keep:
            arguments["logits_to_keep"] = 1
        if hidden_layers:
            total = self._layers + 1
            arguments["output_hidden_states"] = sorted(
                {layer % total for layer in hidden_layers}
            )
        output = self.evaluate(**arguments)
        # Views would keep whole prompts alive.
        hidden = {i: output.hidden_states[i][:, -1].clone() for i in hidden_layers}
        return output.logits[:, -1], hidden

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        tools: Sequence[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a text, of chat messages, or ids as they are.

        See :func:`~adaptspec.model.prompts.encode_prompt` for the rules and arguments.

        Raises:
            InvalidPromptError: if it is empty, out of the vocabulary, or needs a
                tokenizer or chat template that isn't there.
        """
        return encode_prompt(
            self,
            prompt,
            raw=raw,
            tools=tools,
            template_arguments=template_arguments,
        )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def vocabulary_mismatch(self, other: LanguageModel) -> str | None:
        """Why ``other``'s token ids mean something else here, or None."""
        return vocabulary_mismatch(self, other)

    def _limited(self, length: int) -> bool:
        return any(reach.limits(length) for reach in self.reaches.values())

    def _masks(self, build: Any) -> Any:
        if not self.use_masks or not self.reaches:
            return None
        masks = {kind: build(reach) for kind, reach in self.reaches.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _reads_in_parts(self, length: int) -> bool:
        """Whether rows appended behind others are those of one forward of ``length``.

        The probe found that out for tokens to verify; a rotary scaling that the length
        decides on would be another one for the first parts. Not so while the probe
        itself reads.
        """
        known: Capability | None = self.__dict__.get("capability")
        return (
            known is not None
            and known.level != "plain"
            and length - 1 <= depth_limit(self.config, 0)
        )

    def _read_part(
        self,
        tokens: Sequence[int],
        cache: TreeCache | PlainCache,
        last: int,
        hidden_layers: Sequence[int],
    ) -> Forward:
        """:meth:`prefill` in one forward."""
        cached, count = cache.length, len(tokens)
        mask: Any = None
        if isinstance(cache, PlainCache):
            cache.length += count
        elif (cached and count > 1) or self._limited(cached + count):
            mask = self._masks(
                lambda reach: causal_mask(count, cached, reach, self.dtype, self.device)
            )
        return self._run(
            torch.tensor([list(tokens)], device=self.device),
            positions(range(count), cached, self.device),
            cache.inner if isinstance(cache, PlainCache) else cache,
            mask,
            list(range(max(0, count - last), count)),
            hidden_layers,
        )

    def _forget_rotation(self) -> None:
        """Let rotations that grow with the text start from this text alone."""
        for rotary in self._growing:
            forget(rotary)

    def _read_anew(
        self,
        tokens: Sequence[int],
        cache: PlainCache,
        last: int,
        hidden_layers: Sequence[int],
    ) -> Forward:
        """The text with ``tokens`` behind it, in one forward without any cache."""
        assert cache.text is not None
        cached, count = len(cache.text), len(tokens)
        cache.text.extend(tokens)
        cache.length = cached + count
        forward = self._run(
            torch.tensor([cache.text], device=self.device),
            positions(range(cached + count), 0, self.device),
            None,
            None,
            range(cached + max(0, count - last), cached + count),
            hidden_layers,
        )
        return Forward(
            forward.logits,
            {place - cached: row for place, row in forward.rows.items()},
            {layer: states[cached:] for layer, states in forward.hidden.items()},
        )

    def _append(
        self,
        tokens: Sequence[int],
        cache: TreeCache,
        last: int,
        hidden_layers: Sequence[int],
    ) -> Forward:
        """A few tokens behind others, as a chain to verify of which all is kept."""
        cached, count = cache.length, len(tokens)
        chain = TokenTree.chain(tokens[0], tokens[1:])
        forward = self.forward_tree(chain, cache, hidden_layers=hidden_layers)
        cache.truncate(cached + count)
        first = max(0, count - last)
        rows = {first + row: row for row in range(count - first)}
        return Forward(forward.logits[first:], rows, forward.hidden)

    def _run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Any,
        mask: Any,
        kept: Sequence[int],
        hidden_layers: Sequence[int],
    ) -> Forward:
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            self.cache_argument: cache,
            "use_cache": cache is not None,
        }
        if cache is None:  # as a text is read by the model alone
            del arguments[self.cache_argument], arguments["attention_mask"]
        if self.takes_positions:
            arguments["position_ids"] = position_ids
        self._forget_rotation()
        count = input_ids.shape[1]
        whole = len(kept) == count
        if self._takes_keep:
            if whole:
                arguments["logits_to_keep"] = 0
            elif list(kept) == list(range(count - len(kept), count)):
                arguments["logits_to_keep"] = len(kept)
            else:
                arguments["logits_to_keep"] = torch.tensor(kept, device=self.device)
        if hidden_layers:
            total = self._layers + 1
            arguments["output_hidden_states"] = sorted(
                {layer % total for layer in hidden_layers}
            )
        output = self.evaluate(**arguments)
        logits = output.logits[0]
        if not whole and len(logits) != len(kept):  # it doesn't know logits_to_keep
            logits = logits[torch.tensor(kept, device=self.device)]
        if hidden_layers and getattr(output, "hidden_states", None) is None:
            raise NoHiddenStatesError(
                f"{self.name} shows no hidden states, which a strategy asks for; "
                "leave it out"
            )
        hidden = {layer: output.hidden_states[layer][0] for layer in hidden_layers}
        return Forward(logits, {node: row for row, node in enumerate(kept)}, hidden)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of what layers hand on: the embedding's, else the first that isn't an integer."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        if weight.dtype.is_floating_point:
            return weight.dtype  # type: ignore[no-any-return]
    kinds = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(kinds, torch.float32)


def _head_share(model: nn.Module) -> float:
    """The LM head's share of the multiplications that a token takes; 0 if unknown."""
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if not isinstance(head, torch.Tensor):
        return 0.0
    table = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        table = model.get_input_embeddings().weight  # type: ignore[operator]
    weights = sum(p.numel() for p in model.parameters())
    if isinstance(table, torch.Tensor) and table is not head:
        weights -= table.numel()
    return head.numel() / max(weights, head.numel())


def _vocab_size(model: nn.Module, config: Any) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    # A quantised head may keep its weight in another shape, or as a method.
    if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point:
        return int(weight.shape[0])
    return int(getattr(head, "out_features", None) or config.vocab_size)
