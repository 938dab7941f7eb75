"""What `forked` imports ahead: what vLLM imports in each process before it loads its plugins."""

import gc

import vllm.entrypoints.launchers.api_server.entry
import vllm.entrypoints.openai.api_server
import vllm.model_executor.models.registry
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401

gc.collect()
gc.freeze()  # the collector would copy the pages that forks share
