"""From a name to a model: shipped checkpoint, folder, GGUF file or hub id -> (model, tokenizer).

No remote code runs and no pickle is trusted. What can go wrong with a name, a network or a file ends in a `UserError`
of one line that says what to do.
"""

import gc
import hashlib
import json
import logging
import pickle
import re
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import torch
from accelerate.utils import get_max_memory
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from src.base.errors import UserError
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM, CheckpointError
from src.models.families import decoder_layers, dtype_name, has_router, model_type_of, parameter_counts

ASSETS_DIR = Path(__file__).resolve().parents[2] / "assets"
SHIPPED_MODELS = ("blockffn-tiny", "mixtral-tiny")
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
# LLM.int8 on the router would change which experts fire; on the head it would cost logits for little memory.
SKIP_8BIT = ["router_proj", "lm_head"]
# Bytes of weights below which loading takes no time worth a progress bar.
SMALL_WEIGHTS = 10**9
INFO_SECTIONS = ("model", "config", "parameters", "layers", "insertion_points", "measured", "weights")
# Everything a tokenizer or a configuration may need; no .py file is ever fetched.
_SMALL_HUB_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md", "LICENSE*")
_GIT_LFS_MAGIC = b"version https://git-lfs"
_TRY_TINY = "use --model blockffn-tiny, which ships with this repo"


def load_model(
    name_or_path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    use_8bit: bool = False,
    cache_dir: str | Path | None = None,
    max_memory_gb: float | None = None,
    use_8bit_fallback: bool = False,
):
    """Load a causal language model and its tokenizer; the model is in eval mode and its parameters need no gradient.

    name_or_path: `blockffn-tiny` (shipped), a folder (or a .gguf file, or a folder that holds one), or a hub id.
    device: "auto" (CUDA where there is one, else CPU), "cpu", "cuda", "cuda:1".
    dtype: "auto" or "float32" / "float16" / "bfloat16"; see `resolve_dtype`.
    use_8bit: bitsandbytes LLM.int8 weights, the router and the head excepted.
    max_memory_gb: GPU memory for weights, GB; what does not fit stays in host memory (accelerate).
    use_8bit_fallback: after a CUDA out-of-memory error load again in 8 bit, and say so.

    Returns (model, tokenizer). Raises UserError (a ValueError) for a name that is not there, no network, an unknown
    device or dtype; CheckpointError (a ValueError) for a damaged or refused file and for tensors that do not fit.
    """
    target = resolve_device(device)
    target_dtype = resolve_dtype(dtype, target)
    if max_memory_gb is not None and max_memory_gb <= 0:
        raise UserError(f"max_memory_gb is {max_memory_gb}; it must be positive")
    path = resolve_model_path(name_or_path, cache_dir)
    check_weight_files(path)
    reason = None
    try:
        model = _load_weights(path, target, target_dtype, use_8bit, max_memory_gb)
        if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()) and target.type == "cuda":
            reason = f"the weights take more than {max_memory_gb} GB in {dtype_name(model.dtype)}"
    except torch.OutOfMemoryError as error:
        if use_8bit or not use_8bit_fallback:
            bits, other = (" and 8 bit", "") if use_8bit else ("", ", or USE_8BIT_FALLBACK")
            raise UserError(
                f"{name_or_path} does not fit into the memory of {target} in {dtype_name(target_dtype)}{bits}; "
                f"set MAX_MEMORY_GB to keep a part of it in host memory{other}"
            ) from error
        reason = f"out of GPU memory in {dtype_name(target_dtype)}"
    if reason and use_8bit_fallback and not use_8bit:
        # outside the except block: the traceback there would keep the half-loaded model alive
        print(f"{name_or_path}: {reason}; loading in 8 bit", file=sys.stderr)
        model = None
        gc.collect()
        torch.cuda.empty_cache()
        return load_model(name_or_path, device, dtype, True, cache_dir, max_memory_gb)
    if reason:
        print(f"{name_or_path}: {reason}; the rest stays in host memory, which is slow", file=sys.stderr)
    return model.eval().requires_grad_(False), load_tokenizer(path)


def load_tokenizer(path: str | Path):
    """The tokenizer in a model folder or .gguf file, without remote code; pads with `eos` where it names no padding."""
    folder, gguf = _split_gguf(Path(path))
    extra = {} if gguf is None else {"gguf_file": gguf}
    blockffn = is_blockffn(path)
    try:
        if blockffn and (folder / "tokenizer.json").is_file():
            # As the file says: the class that the hub's tokenizer_config names (LlamaTokenizer) would rebuild the
            # normaliser since transformers 5, and read leading spaces otherwise than in training.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            settings = folder / "tokenizer_config.json"
            wants_bos = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("add_bos_token")
            if wants_bos and tokenizer("")["input_ids"] != [tokenizer.bos_token_id]:
                tokenizer.add_bos_token = True  # LlamaTokenizer adds it though tokenizer.json does not
        else:
            config = BlockFFNConfig.from_pretrained(folder) if blockffn else None
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UserError(f"no tokenizer could be read from {folder}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_device(device: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises UserError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        raise UserError(f"device {device!r} is unknown; use auto, cpu or cuda")
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return resolved
    if (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on the CPU, bfloat16 on a GPU that has it (Ampere and later), else float16.

    bfloat16 comes first because MiniCPM's embeddings are multiplied by `scale_emb` and never normalised in the residual
    stream: float16's range of 65,504 is a risk that bfloat16 does not have, at the same size.
    """
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use auto, float32, float16 or bfloat16")
    return DTYPES[dtype]


def resolve_model_path(name_or_path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The local folder (or .gguf file) of a model; a hub id is downloaded into `cache_dir` unless it is there already.

    Raises UserError where there is no such folder, or the hub cannot be reached.
    """
    name = str(name_or_path)
    if name in SHIPPED_MODELS:
        folder = ASSETS_DIR / name
        if not (folder / "config.json").is_file():
            raise UserError(f"the shipped checkpoint {name} is missing: assets/{name} is not in this copy of the repo")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
            raise UserError(f"{name} is not a model folder: it holds neither config.json nor a .gguf file")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file; give the folder that holds it (only a .gguf file stands for itself)")
        return path
    if not is_hub_id(name):
        raise UserError(f"there is no model folder {name}; {_TRY_TINY}")
    return download(name, cache_dir)


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository on the hub (`owner/model` or `model`), rather than a path."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except hub_errors.HFValidationError:
        return False
    return not name.startswith((".", "/", "~"))


def hub_files(name: str) -> dict[str, int]:
    """Files of a hub model that loading needs, {name: bytes}: configuration, tokenizer and one set of weights.

    safetensors are preferred to .bin; folders inside the repository (original/, onnx/) and Python files are left out.
    Raises UserError where the model is not there or the hub cannot be reached.
    """
    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=20)
    except (hub_errors.HTTPError, OSError) as error:
        raise _hub_error(name, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    wanted = {file for file in sizes if any(Path(file).match(pattern) for pattern in _SMALL_HUB_FILES)}
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        weights = {file for file in sizes if file.endswith(suffix) and file.startswith(stem)}
        if weights:
            return {file: sizes[file] for file in sorted(wanted | weights)}
    raise UserError(f"{name} on the hub holds no model*.safetensors or pytorch_model*.bin; give a folder with weights")


def download(name: str, cache_dir: str | Path | None = None) -> Path:
    """Download a hub model (resumes an interrupted download, fetches nothing twice) and return its folder.

    Without network a complete earlier download is used. Raises UserError where there is neither.
    """
    cache_dir = None if cache_dir is None else str(Path(cache_dir).expanduser())
    try:
        files = hub_files(name)
    except UserError as error:
        if error.__cause__ is None or isinstance(error.__cause__, hub_errors.RepositoryNotFoundError):
            raise  # the hub has answered
        try:
            return Path(huggingface_hub.snapshot_download(name, cache_dir=cache_dir, local_files_only=True))
        except (hub_errors.IncompleteSnapshotError, OSError):
            raise error from error.__cause__
    try:
        return Path(huggingface_hub.snapshot_download(name, cache_dir=cache_dir, allow_patterns=sorted(files)))
    except (hub_errors.HTTPError, OSError) as error:
        raise _hub_error(name, error) from error


def is_blockffn(path: str | Path) -> bool:
    """Whether a model folder's config.json describes a BlockFFN (MiniCPM with a routed feed-forward layer)."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {_first_line(error)}") from error
    return config.get("model_type") == "minicpm" and "ffn_type" in config


def weight_files(path: str | Path) -> list[Path]:
    """The weight files that loading reads, sorted by name: safetensors before .bin, a .gguf only without them."""
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "*.gguf"):
        files = sorted(path.glob(pattern))
        if files:
            return files[:1] if pattern == "*.gguf" else files
    raise UserError(f"{path} holds no weights (model*.safetensors, pytorch_model*.bin or a .gguf file)")


def check_weight_files(path: str | Path) -> None:
    """CheckpointError, before anything is loaded, for files that are cut short, missing or Git LFS pointers."""
    path, files = Path(path), weight_files(path)
    for index in sorted(path.glob(f"*{files[0].suffix}.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged; download the model again") from error
        absent = sorted(shards - {file.name for file in files})
        if absent:
            raise CheckpointError(f"{path} is incomplete, not there: {', '.join(absent)}; download the model again")
    for file in files:
        problem = _damage(file)
        if problem:
            raise CheckpointError(f"{file} is {problem} ({file.stat().st_size} bytes); download the model again")


def _damage(file: Path) -> str | None:
    """What a weight file is instead of a whole container of its kind, or None."""
    with file.open("rb") as handle:
        head = handle.read(32)
    if head.startswith(_GIT_LFS_MAGIC):
        return "a Git LFS pointer, not the weights"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"cut short or not safetensors: {_first_line(error)}"
    if file.suffix == ".bin" and not zipfile.is_zipfile(file) and head[:1] != b"\x80":  # 0x80: torch's old format
        return "cut short: the end of the archive is missing" if head[:2] in (b"", b"PK") else "not a PyTorch file"
    return "not a GGUF file" if file.suffix == ".gguf" and head[:4] != b"GGUF" else None


def weights_sha256(name_or_path: str | Path, cache_dir: str | Path | None = None) -> str:
    """sha256 over names and bytes of a model's weight files, without loading them."""
    digest = hashlib.sha256()
    for file in weight_files(resolve_model_path(name_or_path, cache_dir)):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def model_identity(model: nn.Module, path: str | Path, cache_dir: str | Path | None = None) -> dict:
    """Which model this is; `path` is what was given to `load_model`.

    `name` is as the user gave it, `sha256` over names and bytes of the weight files.
    """
    return {
        "name": str(path), "sha256": weights_sha256(path, cache_dir), "model_type": model_type_of(model),
        "num_layers": len(decoder_layers(model)), "parameters": parameter_counts(model)["total"],
        "dtype": dtype_name(model.dtype),
    }  # fmt: skip


def describe_model(model: nn.Module, path: str | Path, cache_dir: str | Path | None = None) -> dict:
    """What `model_info.json` says: identity, configuration, parameter counts, per-layer shapes, insertion points."""
    config = {key: value for key, value in sorted(model.config.to_dict().items()) if not key.startswith("_")}
    for unrelated in ("name_or_path", "auto_map", "transformers_version", "id2label", "label2id"):
        config.pop(unrelated, None)
    layers = [
        {
            "layer": index, "attention": type(layer.self_attn).__name__, "mlp": type(layer.mlp).__name__,
            "shapes": {name: list(parameter.shape) for name, parameter in layer.named_parameters()},
        }
        for index, layer in enumerate(decoder_layers(model))
    ]  # fmt: skip
    points = {"sidecar": {"module": "model.layers.{layer}.self_attn", "width": model.config.hidden_size}}
    if has_router(model):
        experts = decoder_layers(model)[0].mlp.router_proj.out_features
        points["router_signal"] = {"module": "model.layers.{layer}.mlp.router_act_fn", "experts": experts}
    return {
        "model": model_identity(model, path, cache_dir), "config": config, "parameters": parameter_counts(model),
        "layers": layers, "insertion_points": points,
    }  # fmt: skip


def merge_model_info(path: str | Path, info: dict) -> dict:
    """`info`, completed by what an earlier `model_info.json` at `path` says of the same weights, in a fixed order.

    So the scripts that write the file complete each other, in any order; a file about other weights is replaced.
    """
    try:
        earlier = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        earlier = {}  # cut short or edited: written anew
    same = isinstance(earlier, dict) and earlier.get("model") == info["model"]
    merged = (earlier if same else {}) | info
    return {section: merged[section] for section in INFO_SECTIONS if section in merged}


def _load_weights(
    path: Path, device: torch.device, dtype: torch.dtype, use_8bit: bool, max_memory_gb: float | None
) -> nn.Module:
    """The model on its device; every failure that a file can cause comes out as UserError or CheckpointError."""
    folder, gguf = _split_gguf(path)
    # straight to the device, tensor by tensor from the mapped file: the weights never exist twice
    arguments = {"dtype": dtype, "device_map": {"": str(device)}}
    if max_memory_gb is not None and device.type == "cuda":
        memory = {key: value for key, value in get_max_memory().items() if key in (device.index, "cpu")}
        memory[device.index] = min(memory[device.index], int(max_memory_gb * 1e9))
        arguments |= {"device_map": "auto", "max_memory": memory}
    if use_8bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_skip_modules=SKIP_8BIT,
            llm_int8_enable_fp32_cpu_offload=arguments["device_map"] == "auto",
        )
        # It announces once per call that LLM.int8 multiplies in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if gguf is not None:
        arguments["gguf_file"] = gguf
    small = sum(file.stat().st_size for file in weight_files(path)) < SMALL_WEIGHTS
    without_bar = small and transformers_logging.is_progress_bar_enabled()
    if without_bar:
        transformers_logging.disable_progress_bar()
    try:
        if is_blockffn(path):
            return BlockFFNForCausalLM.from_pretrained(folder, **arguments)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, weights_only=True, output_loading_info=True, **arguments
        )
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise CheckpointError(f"{path} does not fit its config.json: missing: {missing}")
        return model
    except (CheckpointError, UserError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: a .bin file in it holds something other than plain tensors, or is damaged"
        ) from error
    except (SafetensorError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error) and "zip" not in str(error):
            raise
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}); download the model again") from error
    except (ValueError, OSError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise UserError(f"{path} needs code of its own, which this repo does not run; {_TRY_TINY}") from error
        raise UserError(f"{path} could not be loaded: {_first_line(error)}") from error
    finally:
        if without_bar:
            transformers_logging.enable_progress_bar()


def _split_gguf(path: Path) -> tuple[Path, str | None]:
    """(folder, file name) of a .gguf file or of a folder without config.json; (folder, None) otherwise."""
    if path.is_file():
        return path.parent, path.name
    return (path, None) if (path / "config.json").is_file() else (path, weight_files(path)[0].name)


def _hub_error(name: str, error: Exception) -> UserError:
    """The hub's refusal or silence, in one line."""
    if isinstance(error, hub_errors.GatedRepoError):
        return UserError(f"{name} is gated on the hub: accept its terms there and log in with `hf auth login`")
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(f"there is no folder and no hub model named {name}; {_TRY_TINY}")
    return UserError(
        f"there is no folder {name}, and the Hugging Face hub cannot be reached ({type(error).__name__}); {_TRY_TINY}, "
        "or run scripts/01_download_model.py where there is a network"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
