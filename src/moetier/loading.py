"""`moetier.from_pretrained`: the checkpoint is checked before anything is loaded, and errors are moetier's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetier.errors import CheckpointError, ConfigError, MoetierError, UnsupportedModelError
from moetier.hf import Options, TieredExpertsConfig
from moetier.stores.shards import Shards


def from_pretrained(
    model: str | Path,
    *,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    slots: str | int | None = None,
    policy: str = "horizon",
    device: str | torch.device | None = None,
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Any:
    """Load a Mixture-of-Experts model with its experts out of core.

    Args:
        model: a folder with a safetensors checkpoint, or the id of one on the Hugging Face hub.
        device_memory: GPU memory the run may take ("8GiB"); by default 80 % of what is free. Ignored without a GPU.
        host_memory: host memory the run may take beside the interpreter's own; by default 80 % of what is free.
        slots: size of the fastest tier as a number of experts or a share ("25%"); overrides its memory budget.
        policy: eviction policy, see `moetier.POLICIES`.
        device: where to compute; by default the first GPU, else the CPU.
        model_class: the transformers class to load with.
        **kwargs: further fields of `moetier.Options` (admission, context, readers, io, record_events), and anything
            that `from_pretrained` of transformers takes (dtype, attn_implementation, revision, …).

    Returns:
        The ordinary transformers model, with its tiers reachable as `model.moetier`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
        UnsupportedModelError: not an MoE, or a family without the experts interface.
        CapacityError: a budget below the minimum, which the message states.
        ConfigError: an argument that cannot be used.
    """
    own = {name: kwargs.pop(name) for name in list(kwargs) if name in Options.__dataclass_fields__}
    config = TieredExpertsConfig(
        device_memory=device_memory, host_memory=host_memory, slots=slots, policy=policy, **own
    )
    kwargs.setdefault("dtype", "auto")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cpu":
        kwargs.setdefault("device_map", {"": torch.device(device)})
    if Path(model).exists() or str(model).startswith((".", "/", "~")):
        check_folder(Path(model).expanduser())
        model = Path(model).expanduser()
    try:
        return model_class.from_pretrained(model, quantization_config=config, **kwargs)
    except MoetierError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise translate(error, model) from error


def check_folder(folder: Path) -> Shards:
    """Validate a local model folder before transformers sees it. Raises `CheckpointError`, `UnsupportedModelError`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; give a folder with config.json, or a hub id")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model folder needs its config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object; download the file again")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UnsupportedModelError(
            f"{path}: the checkpoint is quantised ({method}); moetier runs fp32, fp16 and bf16 checkpoints so far"
        )
    if "auto_map" not in config:
        try:
            AutoConfig.for_model(config.get("model_type", ""))
        except ValueError:
            raise UnsupportedModelError(
                f"{path}: model type {config.get('model_type')!r} is unknown to this version of transformers; upgrade it"
            ) from None
        except Exception:  # only the name matters here; the values are checked when the model is built
            pass
    return Shards.open(folder)


def translate(error: Exception, model: str | Path) -> MoetierError:
    """An error of the loader as one of moetier's, keeping its first lines."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:600]
    if "trust_remote_code" in text:
        return ConfigError(f"{model}: this model needs its own code; pass trust_remote_code=True if you trust it")
    if isinstance(error, OSError):
        return CheckpointError(f"{model}: {text}")
    return CheckpointError(f"{model}: the checkpoint and its config.json do not fit together: {text}")
