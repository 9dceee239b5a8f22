"""What tests of every kind share."""

from pathlib import Path

import pytest

from deploy.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DeepSeek-V2 checkpoint of two MoE layers, 1.5 MB: 32 experts, n_group 8, topk_group 3, top-6."""
    return make_checkpoint(
        tmp_path_factory.mktemp("nano"),
        preset="nano",
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
        q_lora_rank=32,
    )
