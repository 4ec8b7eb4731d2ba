"""Every error AdaptSpec raises on purpose: rule, value, way out."""

from __future__ import annotations


class AdaptSpecError(Exception):
    """A mistake the caller can mend; the command line prints it as one line."""


class UnknownStrategyError(AdaptSpecError, LookupError):
    """No strategy or baseline of that name is registered."""


class InvalidParamsError(AdaptSpecError, ValueError):
    """Strategy parameters outside their declared bounds, or unknown."""


class UnavailableStrategyError(AdaptSpecError, RuntimeError):
    """The strategy exists but can't run on this model."""


class UnsupportedControlError(AdaptSpecError, ValueError):
    """A generation control that can't be honoured without changing the output."""


class InvalidGrammarError(AdaptSpecError, ValueError):
    """A JSON schema, regular expression or grammar can't be used."""


class NoValidTokenError(AdaptSpecError, ValueError):
    """No token has a score to be chosen by: logits are NaN, or all are masked."""


class InvalidPromptError(AdaptSpecError, ValueError):
    """The prompt, its tokens or its length can't be decoded from."""


class InvalidTreeError(AdaptSpecError, ValueError):
    """A strategy proposed something that is not a token tree."""


class ModelLoadError(AdaptSpecError, OSError):
    """A model, tokenizer or the embedded default could not be loaded."""


class NoHiddenStatesError(AdaptSpecError, RuntimeError):
    """A model of its own code doesn't hand out the hidden states that are wanted."""


class EngineError(AdaptSpecError, RuntimeError):
    """Another engine can't be started, asked or ended; with the tail of its log."""


class RoutingError(AdaptSpecError, ValueError):
    """The router's table can't be used, or the router can't be started."""


class SequenceStateError(AdaptSpecError, RuntimeError):
    """A sequence can't go on: its model was changed, or holds another's state."""


class ForkedProcessError(AdaptSpecError, RuntimeError):
    """A model on a GPU can't be used in a process forked from its own."""


class ForkedProcessWarning(UserWarning):
    """A forked process has none of torch's threads, so it decodes with one."""


class PluginError(AdaptSpecError, RuntimeError):
    """A plugin failed to load or broke its contract."""


class PluginConflictError(PluginError):
    """Two plugins claim one name."""


class HeadsLoadError(AdaptSpecError, ValueError):
    """Trained heads can't be read, or don't fit the target."""


class WorkloadError(AdaptSpecError, ValueError):
    """A workload file is missing, empty or has a bad line."""


class TrainingError(AdaptSpecError, RuntimeError):
    """Weights can't be trained so: bad options, too little data or memory, a loss
    that isn't a number."""


class ProfileStoreError(AdaptSpecError, RuntimeError):
    """The profile database can't be opened, read, written or migrated."""


class KnowledgeError(AdaptSpecError, OSError):
    """What strategies learnt can't be written beside the profiles."""


class StoreWarning(UserWarning):
    """What is kept on disk can't be used, or not all of it; work goes on without."""


def stopped_by_user(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or an error of cleaning up after it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
