"""transformers 4.49's Flax architectures as tiny train steps with random weights, built without any download.

One row an architecture: its class, the sizes that its configuration calls by other names, and what it takes as input.
All have 2 layers a side, 4 heads of 16 and sequences of 24 with padding; dropout is a number for all of its kinds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH, LENGTH, TARGET_LENGTH = 2, 24, 20
VOCABULARY, WIDTH, INNER, HEADS, LAYERS, IMAGE = 96, 64, 128, 4, 2, 32
# Configurations that leave layers out at random do it in Python, once a trace: never here.
_AT_RANDOM_IN_PYTHON = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
# Its attention has no key for dropout, so that it raises.
_NO_DROPOUT = {"MistralConfig": ("attention_dropout",)}


@dataclasses.dataclass(frozen=True)
class Step:
    """`loss(params, batch, key)` of an architecture; `key` is for dropout."""

    loss: Callable[[Any, Any, Any], jax.Array]
    params: Any
    batch: Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`build(dropout, dtype)` makes the step; `layers`: how many, where flax.linen cannot be asked."""

    name: str
    class_name: str
    build: Callable[[float, Any], Step]
    layers: dict[str, int] | None = None


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_LLAMA = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
_IMAGE = {**_ENCODER, "image_size": IMAGE, "patch_size": 8, "num_labels": 10}
_WAV = {
    **{name: size for name, size in _ENCODER.items() if name != "max_position_embeddings"},
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
}
_RESIDUAL = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}
_WHISPER = {**_BART, "num_mel_bins": 16, "max_source_positions": LENGTH, "max_target_positions": 64, "pad_token_id": 0}

# Name, class, configuration, sizes, what it takes and learns.
_ROWS: tuple[tuple[str, str, str, dict[str, Any], str], ...] = (
    ("GPT-2", "FlaxGPT2LMHeadModel", "GPT2Config", _GPT, "causal"),
    (
        "GPT-Neo",
        "FlaxGPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **_ENCODER,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        "causal",
    ),
    ("GPT-J", "FlaxGPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}, "causal"),
    (
        "OPT",
        "FlaxOPTForCausalLM",
        "OPTConfig",
        {**_ENCODER, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
        "causal",
    ),
    ("BLOOM", "FlaxBloomForCausalLM", "BloomConfig", {**_GPT, "hidden_size": WIDTH}, "causal"),
    (
        "XGLM",
        "FlaxXGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "ffn_dim": INNER,
            "num_layers": LAYERS,
            "attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
        "causal",
    ),
    ("Llama", "FlaxLlamaForCausalLM", "LlamaConfig", _LLAMA, "causal"),
    ("Gemma", "FlaxGemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 16}, "causal"),
    ("Mistral", "FlaxMistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 8}, "causal"),
    ("BERT", "FlaxBertForMaskedLM", "BertConfig", _ENCODER, "tokens"),
    ("RoBERTa", "FlaxRobertaForMaskedLM", "RobertaConfig", _ENCODER, "tokens"),
    (
        "RoBERTa-PreLayerNorm",
        "FlaxRobertaPreLayerNormForMaskedLM",
        "RobertaPreLayerNormConfig",
        _ENCODER,
        "tokens",
    ),
    ("XLM-RoBERTa", "FlaxXLMRobertaForMaskedLM", "XLMRobertaConfig", _ENCODER, "tokens"),
    ("ALBERT", "FlaxAlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 32}, "tokens"),
    ("ELECTRA", "FlaxElectraForMaskedLM", "ElectraConfig", {**_ENCODER, "embedding_size": 32}, "tokens"),
    (
        "DistilBERT",
        "FlaxDistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "hidden_dim": INNER,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": 64,
        },
        "tokens",
    ),
    ("T5", "FlaxT5ForConditionalGeneration", "T5Config", _T5, "sequences"),
    ("mT5", "FlaxMT5ForConditionalGeneration", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, "sequences"),
    (
        "LongT5 local",
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        {**_T5, "local_radius": 5, "encoder_attention_type": "local"},
        "sequences",
    ),
    (
        "LongT5 global",
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        {**_T5, "local_radius": 5, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        "sequences",
    ),
    ("BART", "FlaxBartForConditionalGeneration", "BartConfig", _BART, "sequences"),
    ("mBART", "FlaxMBartForConditionalGeneration", "MBartConfig", _BART, "sequences"),
    ("Pegasus", "FlaxPegasusForConditionalGeneration", "PegasusConfig", _BART, "sequences"),
    ("Marian", "FlaxMarianMTModel", "MarianConfig", _BART, "sequences"),
    ("Blenderbot", "FlaxBlenderbotForConditionalGeneration", "BlenderbotConfig", _BART, "sequences"),
    (
        "Blenderbot-small",
        "FlaxBlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallConfig",
        _BART,
        "sequences",
    ),
    ("ViT", "FlaxViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    (
        "BEiT",
        "FlaxBeitForImageClassification",
        "BeitConfig",
        {**_IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        "image",
    ),
    ("DINOv2", "FlaxDinov2ForImageClassification", "Dinov2Config", _IMAGE, "image"),
    ("ResNet", "FlaxResNetForImageClassification", "ResNetConfig", {**_RESIDUAL, "layer_type": "basic"}, "image"),
    ("RegNet", "FlaxRegNetForImageClassification", "RegNetConfig", {**_RESIDUAL, "groups_width": 8}, "image"),
    ("CLIP", "FlaxCLIPModel", "CLIPConfig", {}, "image and text"),
    ("Whisper", "FlaxWhisperForConditionalGeneration", "WhisperConfig", _WHISPER, "features"),
    ("wav2vec2", "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", _WAV, "speech"),
    ("Speech-Encoder-Decoder", "FlaxSpeechEncoderDecoderModel", "", {}, "speech to text"),
    ("Vision-Encoder-Decoder", "FlaxVisionEncoderDecoderModel", "", {}, "image to text"),
)


def all_of_them() -> Iterator[Architecture]:
    """Every architecture of the sweep, quick ones among them: see `tests/compat/test_sweep.py`."""
    for name, class_name, config_name, sizes, kind in _ROWS:

        def build(dropout: float, dtype: Any, row: Any = (class_name, config_name, sizes), kind: str = kind) -> Step:
            return _step(*row, kind, dropout, dtype)

        yield Architecture(name, class_name, build)


def require_transformers(selected: Iterable[Architecture]) -> None:
    """
    Raises:
      SystemExit: one of these is of transformers, and a version with Flax models is not installed.
    """
    classes = [found.class_name for found in selected if found.class_name.startswith("Flax")]
    try:
        import transformers

        for name in classes:
            getattr(transformers, name).config_class  # noqa: B018
    except (ImportError, AttributeError) as error:
        if classes:
            raise SystemExit(
                f'sweep: {classes[0]} needs the Flax models of transformers: pip install "transformers==4.49.*"'
            ) from error


def _configuration(config_name: str, sizes: dict[str, Any], kind: str, dropout: float) -> Any:
    import transformers as hf

    if kind == "image and text":
        text = {**_ENCODER, "projection_dim": 32, "eos_token_id": 3}
        config = hf.CLIPConfig(text_config=text, vision_config={**_IMAGE, "projection_dim": 32}, projection_dim=32)
        parts = [config, config.text_config, config.vision_config]
    elif kind == "speech to text":
        speech, text = hf.Wav2Vec2Config(**_WAV), hf.BartConfig(**_BART)
        config = hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(speech, text)
        parts = [config.encoder, config.decoder]
    elif kind == "image to text":
        picture, text = hf.ViTConfig(**_IMAGE), hf.GPT2Config(**_GPT)
        config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(picture, text)
        parts = [config.encoder, config.decoder]
    else:
        config = getattr(hf, config_name)(**sizes)
        parts = [config]
    for part in parts:
        _set_dropout(part, dropout)
    return config


def _set_dropout(config: Any, dropout: float) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            without = (*_AT_RANDOM_IN_PYTHON, *_NO_DROPOUT.get(type(config).__name__, ()))
            setattr(config, name, 0.0 if name in without else dropout)


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """transformers 4.49's T5 calls jnp.clip by an argument's former name."""
    clip = jnp.clip

    def with_old_name(*args: Any, a_max: Any = None, **kwargs: Any) -> jax.Array:
        return clip(*args, **kwargs, **({} if a_max is None else {"max": a_max}))

    with unittest.mock.patch.object(jnp, "clip", with_old_name):
        yield


def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of an architecture of transformers, without dropout, and a batch."""
    (row,) = (row for row in _ROWS if row[0] == name)
    return _model(*row[1:], 0.0, np.float32), _batch(row[4], np.float32)


def _model(class_name: str, config_name: str, sizes: dict[str, Any], kind: str, dropout: float, dtype: Any) -> Any:
    import transformers as hf

    config = _configuration(config_name, sizes, kind, dropout)
    model_class = getattr(hf, class_name)
    options: dict[str, Any] = {}
    if kind == "speech to text":
        options["input_shape"] = ((1, 400), (1, TARGET_LENGTH))
    elif kind == "features":
        options["input_shape"] = (1, 16, 2 * LENGTH)
    elif kind == "image":
        options["input_shape"] = (1, IMAGE, IMAGE, 3)
    elif kind == "speech":
        options["input_shape"] = (1, 400)
    with _old_names():
        return model_class(config, seed=0, dtype=dtype, **options)


def _step(class_name: str, config_name: str, sizes: dict[str, Any], kind: str, dropout: float, dtype: Any) -> Step:
    model = _model(class_name, config_name, sizes, kind, dropout, dtype)
    state = dict(model.params)
    has_state = set(state) == {"params", "batch_stats"}
    params = spread(state["params"] if has_state else state)
    takes = inspect.signature(type(model).__call__).parameters

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        inputs = {name: value for name, value in batch.items() if name != "labels" and name in takes}
        given = {**state, "params": params} if has_state else params
        keys = {"dropout_rng": key} if "dropout_rng" in takes else {}
        mode = {"train": True} if "train" in takes else {"deterministic": False}
        with _old_names():
            found = model(**inputs, params=given, **mode, **keys)
        found = found[0] if has_state else found
        logits = found.logits_per_image if kind == "image and text" else found.logits
        labels = batch["labels"]
        logits = logits[:, : labels.shape[1]] if labels.ndim == 2 else logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Step(loss, params, _batch(kind, dtype))


def _batch(kind: str, dtype: Any) -> dict[str, Any]:
    """Inputs of every name that a model of the kind may take; the second row is padded."""
    rng = np.random.default_rng(2)

    def tokens(length: int) -> Any:
        return jnp.asarray(rng.integers(4, VOCABULARY, (BATCH, length)), jnp.int32)

    def padding(length: int) -> Any:
        return jnp.asarray(np.arange(length) < np.array([[length], [length - 7]]), jnp.int32)

    def normals(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    text = {"input_ids": tokens(LENGTH), "attention_mask": padding(LENGTH)}
    target = {
        "decoder_input_ids": tokens(TARGET_LENGTH),
        "decoder_attention_mask": padding(TARGET_LENGTH),
        "labels": tokens(TARGET_LENGTH),
    }
    speech = {"input_values": normals(BATCH, 400), "inputs": normals(BATCH, 400)}
    sampled = {"attention_mask": jnp.asarray(np.arange(400) < np.array([[400], [300]]), jnp.int32)}
    if kind in ("causal", "tokens"):
        positions = {"position_ids": jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))}
        return {**text, **positions, "labels": tokens(LENGTH)}
    if kind == "sequences":
        return {**text, **target}
    if kind == "image":
        return {"pixel_values": normals(BATCH, 3, IMAGE, IMAGE), "labels": jnp.asarray([1, 7], jnp.int32)}
    if kind == "image and text":
        return {**text, "pixel_values": normals(BATCH, 3, IMAGE, IMAGE), "labels": jnp.asarray([0, 1], jnp.int32)}
    if kind == "features":
        return {"input_features": normals(BATCH, 16, 2 * LENGTH), **target}
    if kind == "speech":
        return {**speech, **sampled, "labels": tokens(16)}
    if kind == "speech to text":
        return {**speech, **sampled, **target}
    return {"pixel_values": normals(BATCH, 3, IMAGE, IMAGE), **target}


def spread(params: Any) -> Any:
    """Weights at which biases, norms' scales and attention scores all matter, as after some training."""
    rng = np.random.default_rng(1)

    def moved(leaf: Any) -> jax.Array:
        return jnp.asarray(np.asarray(leaf) + 0.1 * rng.standard_normal(np.shape(leaf)), leaf.dtype)

    return jax.tree.map(moved, params)
