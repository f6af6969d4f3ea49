"""Models: the embedded one never moves, and every source either gives safetensors or says why."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from gsm8k_core import models
from gsm8k_core.config import LoraSettings, ModelSettings, TrainSettings
from gsm8k_core.distributed import give_memory
from gsm8k_core.errors import ConfigError, ModelError
from gsm8k_core.files import write_json
from gsm8k_core.models import (
    autocast,
    empty_model,
    find_in_wheel,
    load_model,
    load_plain_weights,
    load_tokenizer,
    plain_weights,
    prepare_model,
    resolve_device,
    save_model,
    stop_ids_of_folder,
    stop_token_ids,
    tiny_model,
    tiny_tokenizer,
    weights_digest,
)
from gsm8k_core.training import add_lora

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(tiny_model(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def from_path(folder: Path) -> ModelSettings:
    return ModelSettings(source="path", path=str(folder), prompt="plain")


# The embedded tokenizer


def test_the_tiny_vocabulary_is_small(tokenizer: Any) -> None:
    assert 258 <= len(tokenizer) < 640  # 256 bytes and 2 special tokens at least


@settings(max_examples=150)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = tiny_tokenizer_once()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


_kept: list[Any] = []


def tiny_tokenizer_once() -> Any:
    """Hypothesis and fixtures of a narrower scope do not mix; building it takes 0.1 s."""
    if not _kept:
        _kept.append(tiny_tokenizer())
    return _kept[0]


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    for text in ("1234567890", "3 + 41 = 44", "100"):
        pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
        digits = [piece for piece in pieces if any(c.isdigit() for c in piece)]
        assert all(len(piece) == 1 for piece in digits)
        assert "".join(digits) == "".join(c for c in text if c.isdigit())


def test_nothing_is_added_to_a_text(tokenizer: Any) -> None:
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("1 2")["input_ids"] == tokenizer("1 2", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


FINGERPRINT = """
import hashlib
from gsm8k_core.models import tiny_model, tiny_tokenizer
tokenizer = tiny_tokenizer()
digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
for name, tensor in sorted(tiny_model(tokenizer).state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
digest = digest.hexdigest()
"""


@pytest.fixture(scope="module")
def said_elsewhere() -> list[str]:
    """What FREED_BYTES_KEPT and then FINGERPRINT say in one process of another hash seed."""
    code = "import gc; gc.disable()  # while modules are loaded\n"
    code += f"{FREED_BYTES_KEPT * HAS_MALLINFO2}{FINGERPRINT}print(digest)"
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_VARIABLES}
    environment["PYTHONHASHSEED"] = "2" if environment.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.slow
def test_tokenizer_and_weights_are_the_same_in_every_process_and_for_every_hash_seed(
    said_elsewhere: list[str],
) -> None:
    here: dict[str, str] = {}
    exec(FINGERPRINT, here)
    assert said_elsewhere[-1] == here["digest"]


# The embedded model


def test_the_tiny_model_is_small_and_tied(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    assert 120_000 < sum(p.numel() for p in model.parameters()) < 140_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)


def test_the_tiny_model_does_not_depend_on_what_was_drawn_before(
    tokenizer: Any,
) -> None:
    torch.manual_seed(1)
    one = tiny_model(tokenizer)
    torch.manual_seed(2)
    other = tiny_model(tokenizer)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_tiny_model_leaves_the_random_generator_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    tiny_model(tiny_tokenizer())
    assert torch.equal(torch.rand(2), expected)


# Preparing


def test_the_embedded_source_gives_a_folder_that_loads(tmp_path: Path) -> None:
    settings = ModelSettings(source="embedded", prompt="plain")
    facts = prepare_model(settings, tmp_path / "a")
    again = prepare_model(settings, tmp_path / "b")
    assert facts == again
    assert facts["architecture"] == "Qwen2ForCausalLM"
    assert facts["from"] == "embedded tiny-qwen2"
    assert set(facts["files"]) == {path.name for path in (tmp_path / "a").iterdir()}
    model, tokenizer = load_model(tmp_path / "a", CPU), load_tokenizer(tmp_path / "a")
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    assert not model.training and model.dtype == torch.float32


def test_a_path_gives_its_safe_files_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "modeling.py", "optimizer.pt", "x.pkl"):
        (folder / name).write_bytes(b"evil")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "config.json").write_text("{}", encoding="utf-8")
    facts = prepare_model(from_path(folder), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert facts["from"] == "local folder model"
    assert str(tmp_path) not in json.dumps(facts)


def test_a_folder_of_pickled_weights_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors; pickled weights are not loaded"):
        prepare_model(from_path(folder), tmp_path / "out")


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no config\.json there"):
        prepare_model(from_path(tmp_path / "nowhere"), tmp_path / "out")


def test_a_config_of_no_model_is_told_without_the_name_of_a_temporary_folder(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["model_type"]
    for text in (json.dumps(config), "{"):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError) as caught:
            prepare_model(from_path(folder), tmp_path / text[:2])
        message = str(caught.value)
        assert message.startswith("local folder model: config.json describes no model that ")
        assert message.endswith("; put the model's own there") and "\n" not in message
        assert str(tmp_path) not in message


@pytest.mark.parametrize("num_bytes", [0, 4, 100_000])
def test_weights_that_were_cut_short_are_refused_by_the_name_of_their_file(
    folder: Path, tmp_path: Path, num_bytes: int
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(
        ModelError, match=rf"^{file}: cut short or damaged \(.*\); copy or "
    ) as error:
        prepare_model(from_path(folder), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_part_of_the_weights_that_the_index_names_must_be_there(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"^{folder}: no model-2-of-2\.safetensors, which model"):
        prepare_model(from_path(folder), tmp_path / "out")


def test_a_wheel_that_is_not_installed_is_an_error_with_the_remedy_and_leaves_nothing(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    settings = {"source": "gguf_wheel", "wheel": "no-such-wheel", "gguf_file": "x.gguf"}
    words = ["--model-name", "lost", "--settings", json.dumps(settings)]
    with pytest.raises(ModelError, match="no-such-wheel, .* is not installed: install it") as e:
        script("prepare_model").main([*words, "--output-dir", str(tmp_path / "out")])
    assert "\n" not in str(e.value)
    assert "uv sync --inexact --extra smollm2" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_files_of_an_installed_wheel_are_found_by_name() -> None:
    assert find_in_wheel("pytest", "LICENSE").is_file()
    with pytest.raises(ModelError, match=r"pytest holds no file none\.gguf"):
        find_in_wheel("pytest", "none.gguf")


# The hub, through its real client


def from_hub(hub_id: str = "Qwen/Qwen2.5-0.5B-Instruct") -> ModelSettings:
    return ModelSettings(source="hub", hub_id=hub_id, revision="7ae5575", prompt="plain")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`hub(status, **headers)`: a server in the hub's place that answers so to everything."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    close_session()  # the client reads the proxies when it is made
    servers = []

    def start(status: int, **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_CONNECT = do_GET

            def log_message(self, *_args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    close_session()
    for server in servers:
        server.shutdown()
        server.server_close()


def check_refused(tmp_path: Path, message: str, hub_id: str = "Qwen/Qwen2.5-0.5B-Instruct") -> None:
    with pytest.raises(ModelError) as caught:
        prepare_model(from_hub(hub_id), tmp_path / "m")
    text = str(caught.value)
    assert text.startswith(f"{hub_id} at 7ae5575: {message}") and "\n" not in text


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "the hub has no such model"),
        (404, "RevisionNotFound", "the hub has the model but not this revision"),
        (403, "GatedRepo", "access is gated"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    message: str,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub(status, X_Error_Code=code))
    check_refused(tmp_path, message)


def test_a_proxy_that_refuses_is_one_line(
    hub: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unlike a refused connection, the hub's client lets its own ProxyError through.
    monkeypatch.setenv("HTTPS_PROXY", hub(403))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    check_refused(tmp_path, "the hub cannot be reached")


def test_an_answer_that_is_not_the_hubs_is_one_line(
    hub: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A page to sign in on, as a guest network sends it: status 200 and no JSON.
    monkeypatch.setattr(constants, "ENDPOINT", hub(200))
    check_refused(tmp_path, "the hub cannot be reached")


def test_a_name_that_no_model_can_have_is_one_line(
    hub: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub(404))
    check_refused(tmp_path, "not a model's name (models.<name>.hub_id): ", hub_id="bad id!!")


def test_offline_a_model_that_is_not_in_the_cache_is_one_line(
    hub: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub(404, X_Error_Code="RepoNotFound"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_refused(tmp_path, "the hub cannot be reached")


@pytest.mark.slow  # the hub's client tries six times, half a minute in all
def test_without_a_network_the_script_says_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    settings = from_hub().starting_weights().model_dump_json()
    refused = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_model.py"), "--model-name", "m",
         "--settings", settings, "--output-dir", str(tmp_path / "m")],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), **refused},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("error: Qwen/Qwen2.5-0.5B-Instruct at 7ae5575: the hub cannot be reach")
    assert "set source: path" in last
    assert not [path for path in tmp_path.iterdir() if path.name != "hf"]


# Loading


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for load in (load_tokenizer, lambda folder: load_model(folder, CPU)):
        with pytest.raises(ModelError, match="nowhere: no such model folder"):
            load(tmp_path / "nowhere")


LOADERS: list[Callable[[Path], object]] = [
    load_tokenizer, lambda folder: load_model(folder, CPU), empty_model,
]  # fmt: skip


@pytest.mark.parametrize("load", LOADERS)
def test_pickled_weights_are_refused_before_anything_is_loaded(
    folder: Path, load: Callable[[Path], object]
) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load(folder)  # beside safe ones they are nobody's business
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"^{folder}: holds no \.safetensors; pickled weights"):
        load(folder)


@pytest.mark.parametrize("load", [*LOADERS, None])
def test_an_adapter_beside_the_weights_is_refused(
    folder: Path, tmp_path: Path, load: Callable[[Path], object] | None
) -> None:
    adapted = get_peft_model(
        tiny_model(tiny_tokenizer()), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    shutil.copyfile(tmp_path / "adapter" / "adapter_config.json", folder / "adapter_config.json")
    name = str(folder) if load else "local folder model"
    with pytest.raises(ModelError, match=rf"^{name}: holds an adapter \(adapter_config\.json\)"):
        load(folder) if load else prepare_model(from_path(folder), tmp_path / "out")


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_code_in_a_model_folder_never_runs_whoever_is_at_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tokenizer: bool
) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PretrainedConfig):\n    model_type = 'evil'\n"
        "class Fast(PreTrainedTokenizerFast):\n    pass\n",
        encoding="utf-8",
    )
    if with_tokenizer:
        evil = {"tokenizer_class": "Fast", "auto_map": {"AutoTokenizer": [None, "evil.Fast"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(evil), encoding="utf-8")
    # A path before `--` names the folder of the code, which is not copied.
    auto_map = {"AutoConfig": f"{folder}--evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = json.dumps({"model_type": "evil", "auto_map": auto_map})
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def calls() -> Iterator[Callable[[], object]]:
        yield lambda: prepare_model(from_path(folder), tmp_path / "out")
        yield lambda: load_tokenizer(folder)
        yield lambda: load_model(folder, CPU)
        yield lambda: empty_model(folder)
        yield lambda: stop_ids_of_folder(folder, tiny_tokenizer())

    for call in calls():
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        # What is refused is an error, but a tokenizer that needs no code may be loaded without it.
        with contextlib.suppress(ModelError, ValueError):
            call()
        assert not ran.exists()


def test_every_call_that_could_run_a_model_folders_code_says_not_to() -> None:
    found = 0
    for folder_name in ("gsm8k_core", "scripts", "benchmarks"):
        for path in (ROOT / folder_name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(ast.Attribute(ast.Name(name), "from_pretrained" | "from_config")):
                        if name.startswith("Auto"):
                            found += 1
                            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                            where = f"{path}:{node.lineno}"
                            assert told.get("trust_remote_code") == "False", where
    assert found >= 10


@pytest.mark.parametrize("num_bytes", [0, 4, 100_000])
def test_weights_that_were_cut_short_are_an_error(folder: Path, num_bytes: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:num_bytes])
    with pytest.raises(ModelError, match="model: cannot load the model: ") as caught:
        load_model(folder, CPU)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_an_error_and_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights? .*missing .*layers\.1\.mlp\.up_proj"):
        load_model(folder, CPU)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="model: no usable tokenizer: "):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2"])
def test_a_folder_without_a_tokenizer_is_refused_though_one_could_be_made_up(
    tmp_path: Path, kind: str
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    remedy = r"holds no tokenizer that tells 7 from 8; put .*tokenizer\.json"
    with pytest.raises(ModelError, match=f"^{tmp_path}: {remedy}"):
        load_tokenizer(tmp_path)
    # Its settings alone are no tokenizer either.
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=remedy):
        load_tokenizer(tmp_path)


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path
) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="^local folder model: holds no tokenizer"):
        prepare_model(from_path(folder), tmp_path / "out")


def test_saved_weights_come_back_bit_for_bit(folder: Path, tokenizer: Any) -> None:
    loaded, original = load_model(folder, CPU), tiny_model(tokenizer)
    for (name, a), (_, b) in zip(
        loaded.named_parameters(), original.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_a_model_without_memory_is_the_loaded_one_once_it_has_its_weights(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, 7]}))
    loaded, empty = load_model(folder, CPU), empty_model(folder)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    give_memory(empty, CPU)
    load_plain_weights(empty, plain_weights(loaded))
    assert [name for name, _ in empty.named_parameters()] == [
        name for name, _ in loaded.named_parameters()
    ]  # tied ones once, and in the order in which ranks send them
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(empty(ids).logits, loaded(ids).logits)
    assert empty.generation_config.eos_token_id == [0, 7]


def test_weights_digest_tells_weights_apart_and_nothing_else(folder: Path) -> None:
    before = weights_digest(folder)
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    os.utime(folder / "model.safetensors", (0, 0))
    assert weights_digest(folder) == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    assert weights_digest(folder) != before


# Devices


HAS_MALLINFO2 = hasattr(ctypes.CDLL(None), "mallinfo2")
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_",
                       "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # fmt: skip
# Of glibc's own count, not the kernel's of page faults: some sandboxes count none.
FREED_BYTES_KEPT = """
import ctypes
import torch
from gsm8k_core.models import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
fields = {"_fields_": [(name, ctypes.c_size_t) for name in NAMES]}
Mallinfo2 = type("Mallinfo2", (ctypes.Structure,), fields)
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

# 23 and 29 MiB each: glibc itself keeps up to the size of the largest it was once given back.
for keep, length in ((False, 6_000_000), (True, 7_500_000)):
    if keep:
        keep_freed_memory(torch.device("cpu"))
    before = mallinfo2().fordblks
    tensors = [torch.ones(length) for _ in range(4)]
    del tensors
    print(mallinfo2().fordblks - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MALLINFO2, reason="needs the mallinfo2 of glibc 2.33")
def test_freed_memory_is_kept_for_the_next_tensors(said_elsewhere: list[str]) -> None:
    plain, kept = map(int, said_elsewhere[:2])
    assert plain < 2 * 6_000_000 * 4  # a tensor's place at the most
    assert kept > 3 * 7_500_000 * 4


def test_a_model_that_asks_for_no_gpu_stays_on_the_cpu() -> None:
    assert resolve_device(0) == CPU


def test_no_gpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where the tests' machine has one
    assert resolve_device(1) == CPU
    assert "no GPU found" in caplog.text


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_take_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "gpus_of_machine", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("gsm8k_core.gpus.gpus_of_machine", lambda: 1)
    with pytest.raises(ConfigError, match="GPU that torch cannot use.*CUDA_VISIBLE_DEVICES= "):
        resolve_device(1)
    assert resolve_device(0) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device(1) == CPU


def test_bfloat16_on_the_cpu_computes_in_float32_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models._has_bfloat16.cache_clear()  # it says so once
    with autocast(CPU, "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert "computing in float32" in caplog.text


def test_stop_ids_are_those_of_the_config_and_the_tokenizer(folder: Path, tokenizer: Any) -> None:
    model = load_model(folder, CPU)
    model.generation_config.eos_token_id = [7, 3]
    assert stop_token_ids(model, tokenizer) == [0, 3, 7]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [0]


def test_what_a_chat_template_writes_after_an_answer_ends_a_completion(
    folder: Path, tokenizer: Any
) -> None:
    # As in Qwen2.5's base models, whose EOS is another token.
    model = load_model(folder, CPU)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(model, tokenizer) == [0, end]


def test_a_model_that_could_never_end_is_an_error(folder: Path) -> None:
    model, tokenizer = load_model(folder, CPU), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        stop_token_ids(model, tokenizer)


def test_a_process_without_a_gpu_of_its_own_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="more processes than the 2 GPUs"):
        resolve_device(4)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj"], "the model has no layer q_prj"),
        (["q_proj", "v_prj", "proj"], "the model has no layer v_prj, proj"),  # q_proj alone else
        (["self_attn"], "Target module Qwen2Attention"),
        (["q_proj", "lm_head"], "lm_head and model.embed_tokens of this model are one matrix"),
        (["model.embed_tokens"], "lm_head and model.embed_tokens of this model are one matrix"),
    ],
)
def test_layers_that_can_have_no_adapters_are_told_with_those_there_are(
    tokenizer: Any, targets: list[str], said: str
) -> None:
    settings = TrainSettings(lora=LoraSettings(target_modules=targets))
    with pytest.raises(ConfigError) as caught:
        add_lora(tiny_model(tokenizer), settings)
    message = str(caught.value)
    assert message.startswith(f"methods.<name>.lora.target_modules: {said}")
    assert message.endswith(
        "; there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert "\n" not in message


def test_a_head_of_its_own_can_have_an_adapter(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapted = add_lora(model, TrainSettings(lora=LoraSettings(target_modules=["lm_head"])))
    assert any(".lm_head.lora_B" in name for name, _ in adapted.named_parameters())


def test_plain_weights_of_adapters_are_the_merged_ones_and_leave_the_model_alone(
    tiny_folder: Path,
) -> None:
    model = add_lora(
        load_model(tiny_folder, torch.device("cpu")), TrainSettings(lora=LoraSettings(rank=4))
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = dict(plain_weights(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    merged = dict(model.merge_and_unload().named_parameters())
    assert weights.keys() == merged.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, merged[name].detach())


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], lora_bias=True),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["dora", "bias", "saved", "ia3"],
)
def test_adapters_that_cannot_be_merged_are_refused(adapter: Any) -> None:
    model = get_peft_model(tiny_model(tiny_tokenizer()), adapter)
    with pytest.raises(ModelError, match="adapter 'default' is not plain LoRA"):
        next(plain_weights(model))


def test_weights_that_do_not_fit_the_model_are_refused_by_name() -> None:
    model = tiny_model(tiny_tokenizer())
    whole = dict(plain_weights(model))
    name = "model.layers.0.self_attn.q_proj.weight"
    for wrong, said in (
        ({**whole, "nothing": torch.ones(2)}, r"nothing \(2,\): the model has none"),
        ({**whole, name: torch.ones(64)}, rf"{name} \(64,\): the model has one of \(64, 64\)"),
        ({key: whole[key] for key in whole if key != name}, f"no weights given for {name}"),
    ):
        with pytest.raises(ModelError, match=said):
            load_plain_weights(model, iter(wrong.items()))
    load_plain_weights(model, iter(model.state_dict().items()))  # the tied ones by both names


def test_the_embedded_model_is_made_without_a_word_to_the_generators_of_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    tiny_model(tiny_tokenizer())
    assert seeds == []


def test_stop_ids_of_a_folder_are_those_of_the_loaded_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny_folder, torch.device("cpu")), load_tokenizer(tiny_folder)
    assert stop_ids_of_folder(tiny_folder, tokenizer) == stop_token_ids(model, tokenizer)
    shutil.copytree(tiny_folder, tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    assert stop_ids_of_folder(tmp_path / "bare", tokenizer) == stop_token_ids(model, tokenizer)


def test_what_preparing_recorded_of_a_folder_is_not_taken_for_a_part_of_the_weights(
    tiny_folder: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "mine" / "manifest.json", {"from": "elsewhere"})
    shutil.copytree(tiny_folder, tmp_path / "mine", dirs_exist_ok=True)
    facts = prepare_model(from_path(tmp_path / "mine"), tmp_path / "out")
    assert "manifest.json" not in facts["files"]
    assert not (tmp_path / "out" / "manifest.json").exists()
