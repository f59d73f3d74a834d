"""Run as a script by `hub.verify`: load a saved model as a stranger would, and write down its logits.

The first argument names a JSON file with the request. It runs where `hf_moe_ext` cannot be imported, so it imports
nothing of this package, except for models that the request says need it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


class _NoPlugin:
    """Import finder that hides the package."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hf_moe_ext":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden in the clean process)", name=name)


def first_tensor(output: Any) -> Any:
    """Logits of a model output, or its last hidden state, or the first tensor there is."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def _load(request: dict[str, Any]) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    options = {"dtype": "auto", **request["options"]}
    if request["auto_class"] is None and request["remote_class"] is None:
        return getattr(transformers, request["class_name"]).from_pretrained(request["folder"], **options)
    if request["auto_class"] is None:
        remote = get_class_from_dynamic_module(request["remote_class"], request["folder"])
        return remote.from_pretrained(request["folder"], **options)
    auto_class = getattr(transformers, request["auto_class"])
    return auto_class.from_pretrained(request["folder"], trust_remote_code=True, **options)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    sys.path += [entry for entry in request["sys_path"] if entry not in sys.path]
    if request.get("package") is None:
        sys.meta_path.insert(0, _NoPlugin)
    else:  # the model says that it needs it
        sys.path.insert(0, request["package"])
        importlib.import_module("hf_moe_ext")

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, __version__

    torch.set_num_threads(request["threads"])
    model = _load(request).to(request["device"]).eval()
    inputs = {name: tensor.to(request["device"]) for name, tensor in load_file(request["inputs"]).items()}
    tensors = {}
    with torch.no_grad():
        tensors["default"] = first_tensor(model(**inputs)).float().cpu().contiguous()
        if request["can_choose_experts"]:
            model.set_experts_implementation("eager")
        tensors["eager"] = first_tensor(model(**inputs)).float().cpu().contiguous()
    save_file(tensors, request["logits"])

    answer: dict[str, Any] = {"class_name": type(model).__name__, "transformers": __version__}
    if request["text"] is not None:
        answer["ids"] = AutoTokenizer.from_pretrained(request["folder"])(request["text"])["input_ids"]
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
