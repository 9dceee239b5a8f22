"""A model in parameters and bytes, part by part, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from experts.errors import ConfigError
from experts.shape import MoEShape, routing_of

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What sizes need to know of one attention layer, latent (MLA) or with key-value heads (GQA)."""

    num_params: int  # projections, their inner norms excluded
    num_norm_params: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_head_dim: int  # of keys and values of a head together, as they come out of the cache's values
    kv_values: int  # numbers that the KV cache holds for one token
    is_latent: bool

    @classmethod
    def of(cls, model: Mapping[str, object]) -> Self:
        return cls._latent(model) if model.get("kv_lora_rank") is not None else cls._with_kv_heads(model)

    @classmethod
    def _latent(cls, model: Mapping[str, object]) -> Self:
        """DeepSeek-V2, section 2.1: the cache holds a latent vector and one rotated key for all heads."""
        hidden, heads = _int(model, "hidden_size"), _int(model, "num_attention_heads")
        rank, rope = _int(model, "kv_lora_rank"), _int(model, "qk_rope_head_dim")
        nope, v_head_dim = _int(model, "qk_nope_head_dim"), _int(model, "v_head_dim")
        q_rank = 0 if model.get("q_lora_rank") is None else _int(model, "q_lora_rank")
        q_params = (hidden + heads * (nope + rope)) * q_rank if q_rank else hidden * heads * (nope + rope)
        kv_params = hidden * (rank + rope) + rank * heads * (nope + v_head_dim)
        return cls(
            num_params=q_params + kv_params + heads * v_head_dim * hidden,
            num_norm_params=q_rank + rank,
            num_heads=heads,
            qk_head_dim=nope + rope,
            v_head_dim=v_head_dim,
            kv_head_dim=nope + v_head_dim,
            kv_values=rank + rope,
            is_latent=True,
        )

    @classmethod
    def _with_kv_heads(cls, model: Mapping[str, object]) -> Self:
        hidden, heads = _int(model, "hidden_size"), _int(model, "num_attention_heads")
        kv_heads = _int(model, "num_key_value_heads", default=heads)
        head_dim = _int(model, "head_dim", default=hidden // heads)
        return cls(
            num_params=2 * hidden * (heads + kv_heads) * head_dim,
            num_norm_params=2 * head_dim if model.get("model_type") in _NORM_PER_HEAD else 0,
            num_heads=heads,
            qk_head_dim=head_dim,
            v_head_dim=head_dim,
            kv_head_dim=2 * head_dim,
            kv_values=2 * kv_heads * head_dim,
            is_latent=False,
        )


# Models that norm queries and keys before they are multiplied.
_NORM_PER_HEAD = frozenset({"qwen3_moe"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of a model by the part that they belong to; prediction heads (MTP), which are not served, left out."""

    shape: MoEShape
    attention_shape: AttentionShape
    num_layers: int
    vocab_size: int
    context: int | None  # tokens; None where config.json does not say
    mlp_width: int  # of the widest MLP that is no routed expert
    dtype: str | None  # what config.json says that the weights are stored in

    routed: int  # parameters of all routed experts
    attention: int  # projections of all layers
    shared: int  # shared experts
    dense: int  # MLPs of the layers without experts
    embeddings: int  # of the input, and of the output where it has its own
    gates: int  # of the MoE layers, with their selection bias
    norms: int

    @classmethod
    def of(cls, model: Mapping[str, object]) -> Self:
        """model: the content of config.json. Raises ConfigError that names the field that is missing or wrong."""
        if model.get("quantization_config"):
            raise ConfigError(
                "config.json has a quantization_config, and experts are read in BF16, F16 and F32 only: "
                "use an unquantised version of the checkpoint"
            )
        shape = shape_of(model)
        hidden, num_layers = shape.hidden_size, _int(model, "num_hidden_layers")
        num_moe_layers = len(shape.moe_layers)
        attention = AttentionShape.of(model)
        shared_width = _int(model, "n_shared_experts", default=0, least=0) * shape.moe_intermediate_size
        num_dense = num_layers - num_moe_layers
        dense_width = _int(model, "intermediate_size") if num_dense else 0
        vocab_size = _int(model, "vocab_size")
        dtype = model.get("dtype", model.get("torch_dtype"))
        return cls(
            shape=shape,
            attention_shape=attention,
            num_layers=num_layers,
            vocab_size=vocab_size,
            context=_int(model, "max_position_embeddings", default=0) or None,
            mlp_width=max(shared_width, dense_width),
            dtype=str(dtype) if dtype is not None else None,
            routed=num_moe_layers * shape.num_experts * 3 * hidden * shape.moe_intermediate_size,
            attention=num_layers * attention.num_params,
            shared=num_moe_layers * 3 * hidden * shared_width,
            dense=num_dense * 3 * hidden * dense_width,
            embeddings=vocab_size * hidden * (1 if model.get("tie_word_embeddings") else 2),
            gates=num_moe_layers * shape.num_experts * (hidden + shape.uses_bias),
            norms=num_layers * (2 * hidden + attention.num_norm_params) + hidden,
        )

    @property
    def rest(self) -> int:
        """Parameters of everything but the routed experts: what an attention engine holds."""
        return self.attention + self.shared + self.dense + self.embeddings + self.gates + self.norms

    @property
    def total(self) -> int:
        return self.routed + self.rest

    def group_bytes(self, num_groups: int, dtype: str) -> int:
        """Weights of one of `num_groups` expert groups, as they are stored."""
        self.shape.check_num_groups(num_groups)
        return self.routed // num_groups * itemsize(dtype)

    def rest_bytes(self, dtype: str) -> int:
        return self.rest * itemsize(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        return self.num_layers * self.attention_shape.kv_values * itemsize(dtype)


def group_counts(shape: MoEShape) -> list[int]:
    """The numbers of expert groups D that a model can be split into."""
    unit = shape.num_model_groups if shape.num_model_groups > 1 else shape.num_experts
    return [d for d in range(1, unit + 1) if unit % d == 0]


def itemsize(dtype: str) -> int:
    """Bytes of one number. Raises ConfigError for a type that experts are not served in."""
    if dtype not in ITEMSIZE:
        raise ConfigError(f"dtype is {dtype}, and must be one of {', '.join(ITEMSIZE)}: set model.dtype")
    return ITEMSIZE[dtype]


def shape_of(model: Mapping[str, object]) -> MoEShape:
    """The MoE part of a config.json, without any tensor to compare it with."""
    num_layers = _int(model, "num_hidden_layers")
    width = "moe_intermediate_size" if "moe_intermediate_size" in model else "intermediate_size"
    layers = tuple(layer for layer in range(num_layers) if _has_experts(model, layer))
    if not layers:
        raise ConfigError(f"config.json gives none of the {num_layers} layers routed experts")
    return MoEShape(
        moe_layers=layers,
        hidden_size=_int(model, "hidden_size"),
        moe_intermediate_size=_int(model, width),
        **routing_of(model),  # pyright: ignore[reportArgumentType]  (routing_of checked each field)
    )


def _has_experts(model: Mapping[str, object], layer: int) -> bool:
    first = _int(model, "first_k_dense_replace", default=0, least=0)
    every, step = _int(model, "moe_layer_freq", default=1), _int(model, "decoder_sparse_step", default=1)
    dense = model.get("mlp_only_layers") or ()
    return (
        layer >= first
        and layer % every == 0
        and (layer + 1) % step == 0
        and not (isinstance(dense, list | tuple) and layer in dense)
    )


def _int(model: Mapping[str, object], name: str, *, default: int | None = None, least: int = 1) -> int:
    """A whole number of config.json; `default` where it is absent or null, None: it must be there."""
    value = default if model.get(name) is None else model[name]
    if isinstance(value, int) and not isinstance(value, bool) and (value >= least or value == default):
        return value
    raise ConfigError(f"config.json: {name} is {value!r}, and must be a whole number of at least {least}")
