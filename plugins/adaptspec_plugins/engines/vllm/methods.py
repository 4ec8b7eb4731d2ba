"""vLLM's speculative methods, their parameters under vLLM's own names, and when each
can be used.

A setting is a server that takes about a minute to start, so few values of each
parameter are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, create_model

from adaptspec.engines.inference_engine import PLAIN_METHOD, Method
from adaptspec.errors import EngineError
from adaptspec.params import Params, Tunable
from adaptspec_plugins.engines.model_folder import ModelFolder
from adaptspec_plugins.engines.vllm.installation import Installation


class NgramParams(Params):
    """n-grams are looked up as vLLM does by itself; the number of tokens, which it has
    no default for, is that of its documentation."""

    num_speculative_tokens: Annotated[int, Tunable(5, 32, step=9)] = Field(
        default=5, ge=1, le=128, description="tokens drafted in a step"
    )
    prompt_lookup_max: Annotated[int, Tunable(2, 8, step=3)] = Field(
        default=5, ge=1, le=64, description="longest n-gram looked up, in tokens"
    )
    prompt_lookup_min: Annotated[int, Tunable(2, 5, step=3)] = Field(
        default=5,
        ge=1,
        le=64,
        description="shortest n-gram looked up, in tokens; at most prompt_lookup_max "
        "is told",
    )


class SuffixParams(Params):
    """Of Arctic Inference's suffix trees (Oliaro et al. 2024, arXiv:2411.04975)."""

    num_speculative_tokens: Annotated[int, Tunable(8, 40, step=16)] = Field(
        default=24, ge=1, le=256, description="most tokens drafted in a step"
    )
    suffix_decoding_max_spec_factor: Annotated[float, Tunable(1, 3, step=2)] = Field(
        default=1.0,
        gt=0,
        le=16,
        description="tokens drafted for each token that the match is long",
    )
    suffix_decoding_min_token_prob: Annotated[float, Tunable(0.1, 0.5, step=0.4)] = (
        Field(
            default=0.1,
            ge=0,
            le=1,
            description="least estimated probability of a token",
        )
    )
    suffix_decoding_max_tree_depth: Annotated[int, Tunable(24, 64, step=40)] = Field(
        default=24, ge=1, le=256, description="longest match and draft together"
    )
    suffix_decoding_max_cached_requests: int = Field(
        default=0,
        ge=0,
        description="earlier answers that are searched too; 0: the prompt alone. A "
        "measurement keeps none, since an answer would be copied from the one before",
    )


def drafted(
    default: int, low: int, high: int, step: int, most: int, **fixed: Any
) -> type[Params]:
    """Parameters of a method that drafts a number of tokens and has nothing else.

    Args:
        fixed: Further fields, which aren't searched.
    """
    low, high = min(low, most), min(high, most)
    searched = (Tunable(low, high, step=step),) if low < high else ()
    kind: Any = Annotated[(int, *searched)] if searched else int
    described = Field(
        default=min(default, most),
        ge=1,
        le=most,
        description="tokens drafted in a step",
    )
    # The name is vLLM's, as in the classes above.
    return create_model(
        "DraftedParams",
        __base__=Params,
        num_speculative_tokens=(kind, described),
        **fixed,
    )


NGRAM = Method(
    "ngram",
    "copies what followed the same n-gram earlier in prompt and output",
    NgramParams,
    general=False,
)
NGRAM_GPU = Method(
    "ngram_gpu",
    "copies by n-grams that are looked up on the GPU, with steps scheduled ahead",
    NgramParams,
    general=False,
)
SUFFIX = Method(
    "suffix",
    "copies by a tree of all suffixes of prompt and output",
    SuffixParams,
    general=False,
)
DRAFT = Method("draft_model", "a smaller model drafts", drafted(5, 1, 7, 2, most=64))
TWO_VOCABULARIES = Method(
    DRAFT.name,
    "a smaller model drafts, of the tokens that it shares with the model",
    drafted(
        *(5, 1, 7, 2),
        most=64,
        use_heterogeneous_vocab=(
            bool,
            Field(default=True, description="draft tokens that both vocabularies have"),
        ),
    ),
)
TRIED = ("eagle3", "eagle", "medusa")
# Heads of other kinds that vLLM 0.32 knows; none could be tried here yet.
UNTRIED = ("dflash", "dspark", "mlp_speculator")
# The version whose source tells of `ngram_gpu` and `use_heterogeneous_vocab` as here.
NEWER = (0, 32)


@dataclass(frozen=True)
class Option:
    """A method that can be used here.

    Args:
        model: Of the drafter, where it has weights of its own.
    """

    method: Method
    model: ModelFolder | None = None

    def config(self, params: Params) -> dict[str, Any]:
        """What ``--speculative-config`` takes; empty for plain decoding."""
        if self.method is PLAIN_METHOD:
            return {}
        model = {} if self.model is None else {"model": self.model.given}
        told = params.model_dump()
        if self.method in (NGRAM, NGRAM_GPU):
            longest, shortest = told["prompt_lookup_max"], told["prompt_lookup_min"]
            told["prompt_lookup_min"] = min(shortest, longest)
        return {"method": self.method.name, **model, **told}


def options_of(
    target: ModelFolder,
    draft: ModelFolder | None,
    heads: Sequence[ModelFolder],
    installation: Installation,
) -> tuple[dict[str, Option], dict[str, str]]:
    """What can be used with these models, by name, and why the others can't.

    Raises:
        EngineError: where heads are of no known kind, or two of one kind.
    """
    found = [Option(PLAIN_METHOD), Option(NGRAM)]
    missing: dict[str, str] = {}
    newer = installation.is_at_least(NEWER)
    least = ".".join(map(str, NEWER))
    if installation.device == "cpu":
        missing[NGRAM_GPU.name] = "needs a GPU"
    elif not newer:
        missing[NGRAM_GPU.name] = f"is tried with vLLM {least} or newer"
    else:
        found.append(Option(NGRAM_GPU))
    if installation.suffix_is_missing is None:
        found.append(Option(SUFFIX))
    else:
        missing[SUFFIX.name] = installation.suffix_is_missing
    if draft is None:
        missing[DRAFT.name] = "needs a draft model: --draft-model"
    elif not (why := target.reads_otherwise(draft)):
        found.append(Option(DRAFT, draft))
    elif newer:
        found.append(Option(TWO_VOCABULARIES, draft))
    else:
        missing[DRAFT.name] = f"needs one vocabulary, or vLLM {least} or newer: {why}"
    for folder in heads:
        if (kind := _kind(folder)) in UNTRIED:
            missing[kind] = (
                f"vLLM may take {folder.name}, but heads of that kind aren't tried yet"
            )
        else:
            found.append(_of_heads(folder, kind))
    if target.mtp_layers:
        found.append(Option(_mtp(target.mtp_layers)))
    else:
        missing["mtp"] = "the model has no layers that predict further tokens"
    names = [option.method.name for option in found]
    for name in TRIED:
        if names.count(name) > 1:
            raise EngineError(f"heads of kind {name!r} were given twice; give one")
        if name not in names:
            missing[name] = f"needs heads of that kind: --heads FOLDER with {name}'s"
    return {option.method.name: option for option in found}, missing


def kind_of_heads(config: Mapping[str, Any], name: str) -> str | None:
    """One of ``TRIED`` or ``UNTRIED``; None: of no kind that is known.

    Args:
        config: Of the heads' folder.
        name: The folder's, which vLLM reads as well.
    """
    told = [
        *(str(config.get(key) or "") for key in ("speculators_model_type",)),
        *(str(word) for word in config.get("architectures") or ()),
        str(config.get("model_type") or ""),
    ]
    if "medusa_num_heads" in config:
        return "medusa"
    for word in (*told, Path(name).name):
        plain = _plain(word)
        for kind in (*TRIED, *UNTRIED):
            if _plain(kind) in plain:
                return kind
    return None


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def _kind(folder: ModelFolder) -> str:
    kind = kind_of_heads(folder.config, folder.given)
    if kind is None:
        raise EngineError(
            f"{folder.given}: its config.json names no heads of a kind that vLLM is "
            f"known to take ({', '.join((*TRIED, *UNTRIED))}); leave it out of --heads"
        )
    return kind


def _of_heads(folder: ModelFolder, kind: str) -> Option:
    if kind == "medusa":
        config = folder.config
        count = int(config.get("medusa_num_heads") or config.get("num_heads") or 5)
        params = drafted(count, 1, count, max(1, (count - 1) // 2), most=count)
        return Option(Method(kind, "Medusa heads draft a chain", params), folder)
    params = drafted(3, 1, 5, 2, most=64)
    summary = {
        "eagle": "an EAGLE head drafts from the target's last hidden states",
        "eagle3": "an EAGLE-3 head drafts from hidden states of several layers",
    }
    return Option(Method(kind, summary[kind], params), folder)


def _mtp(layers: int) -> Method:
    """Drafts of more tokens than layers must be a multiple of them."""
    params = drafted(layers, layers, 3 * layers, layers, most=8 * layers)
    return Method("mtp", "the model's own layers for further tokens draft", params)
