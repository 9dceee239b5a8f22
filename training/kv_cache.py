"""How many bytes of cache a token costs in a running vLLM engine.

    python -m training.kv_cache CHECKPOINT

Prints one line of JSON: the bytes of the cache tensors that the engine has allocated, over the tokens they hold.
"""

import json
import os
import sys


def main() -> None:
    """Starts an engine in this process, so that its tensors can be looked at."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=2)
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    size_bytes = sum(storages.values())  # layers may be views of one allocation
    num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    assert num_blocks is not None
    result = {
        "bytes_per_token": size_bytes / (num_blocks * block_size),
        "dtype": str(caches[0].dtype).removeprefix("torch."),
        "num_blocks": num_blocks,
        "block_size": block_size,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
