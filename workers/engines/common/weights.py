"""Loading a transformers model for its declared kinds, and what its configuration says about using it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from shared.errors import EngineLoadError
from shared.settings import ModelSpec
from workers.engines.common.roles import Role, role_of
from workers.engines.common.text import TextCodec, first_line

_LOADERS = {
    Role.DECODER: AutoModelForCausalLM,
    Role.ENCODER: AutoModel,
    Role.CLASSIFIER: AutoModelForSequenceClassification,
    Role.SEQ2SEQ: AutoModelForSeq2SeqLM,
}

_SHOWN_KEYS = 3

_ONE_AT_A_TIME = threading.Lock()
"""Loading changes PyTorch for the whole process while it works (the default type, what initialises weights), and each
engine of a worker loads on a thread of its own."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How a sequence-to-sequence model's answers begin, and what is never in them.

    ``start`` is what the decoder is given first: its start token, and the token that the model's configuration forces
    first (BART's, a target language). ``forbidden`` tokens are never chosen (Marian's padding).
    """

    start: tuple[int, ...]
    forbidden: tuple[int, ...]


def load_weights(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """The model on the CPU, ready for inference; raise :class:`EngineLoadError` where it cannot be had.

    A model that lacks the head its kinds need is refused: transformers would make one up from random numbers.
    """
    role = role_of(spec)
    transformers.utils.logging.disable_progress_bar()
    options = {"trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.path, **options)
        if not _fits(config, role, spec):
            raise EngineLoadError(_misfit(spec, config, role))
        loader = _LOADERS[role]
        with _ONE_AT_A_TIME:
            model, found = loader.from_pretrained(
                spec.path, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except UnpicklingError as error:
        raise EngineLoadError(f"the weights of {spec.name!r} at {spec.path!r} hold more than tensors") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EngineLoadError(f"cannot load {spec.name!r} from {spec.path!r}: {first_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing and role is not Role.ENCODER:  # an encoder may lack the pooler: token vectors come before it
        shown = ", ".join(missing[:_SHOWN_KEYS]) + (", ..." if len(missing) > _SHOWN_KEYS else "")
        raise EngineLoadError(f"{_misfit(spec, config, role)}: its weights lack {shown}")
    return model.eval()


def _fits(config: Any, role: Role, spec: ModelSpec) -> bool:
    if spec.trust_remote_code and hasattr(config, "auto_map"):
        return True  # a class of its own, which only loading can tell
    if type(config) not in _LOADERS[role]._model_mapping:
        return False
    if role is Role.CLASSIFIER:
        return True
    # transformers would take one half of a sequence-to-sequence model, and lets a masked model look ahead.
    masked = role is Role.DECODER and any("MaskedLM" in name for name in getattr(config, "architectures", None) or ())
    return not masked and bool(getattr(config, "is_encoder_decoder", False)) == (role is Role.SEQ2SEQ)


def _misfit(spec: ModelSpec, config: Any, role: Role) -> str:
    made = ", ".join(getattr(config, "architectures", None) or [config.model_type])
    return f"model {spec.name!r} is declared for {', '.join(spec.kinds)}, which needs a {role}; it is a {made}"


def context_of(spec: ModelSpec, config: Any, model: Any = None) -> int | None:
    """The longest sequence in tokens: the model's own, and no more than is configured."""
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    own = own - first_position(model) if own and model is not None else own
    limits = [limit for limit in (own, spec.max_length) if limit]
    return min(limits) if limits else None


def first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa and its kin count from behind their padding token's id."""
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    shifted = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) + 1 if embeddings is not None and shifted else 0


def eos_tokens(model: Any, codec: TextCodec) -> frozenset[int]:
    """The tokens that end an answer: the generation settings', else the model's, else the tokenizer's."""
    for value in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        codec.tokenizer.eos_token_id,
    ):
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def pad_token(config: Any, codec: TextCodec) -> int:
    """A token to pad with: which one does not matter, for padding is masked."""
    pad = codec.tokenizer.pad_token_id
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    return int(pad) if pad is not None else 0


def writing_of(spec: ModelSpec, model: Any) -> Writing:
    """How a sequence-to-sequence model writes; raise :class:`EngineLoadError` where it names no token to start from."""
    settings = model.generation_config
    start = [
        settings.decoder_start_token_id
        if settings.decoder_start_token_id is not None
        else getattr(model.config, "decoder_start_token_id", None),
        settings.forced_bos_token_id,
    ]
    if start[0] is None:
        start[0] = settings.bos_token_id
    if start[0] is None:
        raise EngineLoadError(f"model {spec.name!r} names no decoder_start_token_id")
    words = [word[0] for word in settings.bad_words_ids or () if len(word) == 1]
    return Writing(
        tuple(int(token) for token in start if token is not None),
        tuple(sorted({*words, *(settings.suppress_tokens or ())})),
    )
