"""What sort of model a declaration asks for: its kinds decide with which head the weights are loaded."""

from __future__ import annotations

from enum import StrEnum

from shared.contract import Kind
from shared.errors import EngineLoadError
from shared.settings import ModelSpec


class Role(StrEnum):
    """The sorts of model that the engines run."""

    DECODER = "causal language model"
    ENCODER = "text encoder"
    CLASSIFIER = "sequence classifier"
    SEQ2SEQ = "sequence-to-sequence model"


GENERATING = frozenset({Kind.GENERATE, Kind.CHAT})
REWRITING = frozenset({Kind.SUMMARIZE, Kind.TRANSLATE})
WRITING = GENERATING | REWRITING

KINDS: dict[Role, frozenset[Kind]] = {
    Role.DECODER: GENERATING,
    Role.ENCODER: frozenset({Kind.EMBED}),
    Role.CLASSIFIER: frozenset({Kind.CLASSIFY, Kind.RERANK}),
    Role.SEQ2SEQ: REWRITING,
}


def role_of(spec: ModelSpec) -> Role:
    """The role in which a model of these kinds is loaded; a decoder may embed beside its writing.

    Raises :class:`EngineLoadError` for kinds that no one model answers.
    """
    declared = frozenset(spec.kinds)
    roles = [role for role, kinds in KINDS.items() if declared & kinds]
    if roles == [Role.DECODER, Role.ENCODER]:
        return Role.DECODER
    if len(roles) != 1:
        wanted = "; ".join(f"{', '.join(sorted(declared & KINDS[role]))}: a {role}" for role in roles)
        raise EngineLoadError(
            f"model {spec.name!r} is declared for kinds that different sorts of model answer ({wanted}): "
            "declare the model of each by a name of its own"
        )
    return roles[0]
