"""Upcycling a checkpoint from folder to folder, one layer in memory at a time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..files import check_target, staged_folder
from ..modeling.configuration_moe_ext import LayerExtension, RouterConfig
from .layer_jobs import LayerJob
from .live import dense_class, fill_created, fill_parts, finish_report, make_report
from .methods import method_class
from .plan import UpcycleOptions, UpcyclePlan, make_plan
from .report import Difference, UpcycleReport, compare, rounding_tolerance, worst
from .safetensors_io import SINGLE_NAME, SafetensorsFolder, SafetensorsWriter, TensorInfo, parse_size
from .stored_names import missing_names, stored_names


logger = logging.get_logger(__name__)

# Files beside the weights that belong to the model, whatever its architecture.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_TOKENS_MEASURED = 16


def upcycle_checkpoint(
    source: str | Path | Sequence[str | Path],
    destination: str | Path,
    method: str = "sparse",
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    router: RouterConfig | dict[str, Any] | str | None = None,
    parts: LayerExtension | dict[str, Any] | None = None,
    layers: str | Sequence[int | str] = "all",
    target: Literal["auto", "stock", "ext"] = "auto",
    gate_init: str | dict[str, torch.Tensor] = "normal",
    gate_noise: float = 0.0,
    seed: int = 0,
    check: bool = True,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **method_options: Any,
) -> UpcycleReport:
    """Make a Mixture-of-Experts checkpoint of a dense one, without loading either model.

    Peak memory is about one layer, dense and converted, or the largest other tensor. The destination appears when it
    is complete; whatever goes wrong before leaves nothing behind.

    Args:
        source (`str`, or a `list` of them):
            Folder with safetensors, or a name on the Hub. Several folders, the seed first, are mixed by the methods
            `"bam"` and `"btx"`.
        destination (`str`):
            Folder to write. Loads with `from_pretrained`, to the tensors that `upcycle` gives for the same seed.
        method, num_experts, num_experts_per_tok, router, parts, layers, target, gate_init, gate_noise, seed:
            As in `upcycle`. Initialisations that run the dense model are not possible here; their result may be given
            as tensors.
        check (`bool`, *optional*, defaults to `True`):
            Compare each converted block with its dense block on random input.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Size of one file.
        dtype (`torch.dtype`, *optional*):
            Of the floating-point tensors written. `None` keeps that of each tensor.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is already at `destination` is replaced.

    Returns:
        What was done.

    Raises:
        TypeError, ValueError, FileNotFoundError, FileExistsError: before anything is written.
        OSError: where the disk is full. Nothing is left behind then.

    Example:
        ```python
        >>> print(upcycle_checkpoint("dense-7b", "moe-8x7b", target="stock", dtype=torch.bfloat16))
        ```
    """
    if not isinstance(source, (str, Path)):
        from .bam import mix_checkpoints  # which needs this file

        if num_experts not in (None, len(source)):
            raise ValueError(
                f"{len(source)} sources make {len(source)} experts, `num_experts` asks for {num_experts}."
            )
        return mix_checkpoints(
            source,
            destination,
            method,
            num_experts_per_tok=num_experts_per_tok,
            router=router,
            parts=parts,
            layers=layers,
            target=target,
            gate_init=gate_init,
            gate_noise=gate_noise,
            seed=seed,
            max_shard_size=max_shard_size,
            dtype=dtype,
            overwrite=overwrite,
            **method_options,
        )
    options = UpcycleOptions(
        method,
        *method_class(method).counts(num_experts, num_experts_per_tok, None),
        router,
        layers,
        target,
        gate_init,
        gate_noise=gate_noise,
        seed=seed,
        method_options=method_options,
        parts=parts,
    )
    options.check()
    options.check_single_source()
    shard_size = parse_size(max_shard_size)
    place = check_target(destination, overwrite=overwrite)
    folder = _local(source)
    if folder.resolve() == place:
        raise ValueError(f"`destination` is the source folder {folder}; choose another one.")
    checkpoint = SafetensorsFolder(folder)
    main_dtype = dtype or checkpoint.main_dtype
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        dense = dense_class(config, source)._from_config(config, dtype=main_dtype).eval()
        plan = make_plan(dense, options)
        model = plan.result_class(dense)._from_config(plan.result_config(dense), dtype=main_dtype).eval()
    plan.make_gates(None)
    report = make_report(plan, dense)
    report.source = str(source)
    finish_report(report, model)
    converter = _Converter(plan, dense, model, checkpoint, dtype)
    infos = converter.infos()
    check_space(place, sum(info.num_bytes for info in infos.values()))
    try:
        with staged_folder(place, overwrite=overwrite) as staging:
            write_companions(folder, staging, model)
            writer = SafetensorsWriter(staging, infos, shard_size)
            converter.run(writer, check)
            writer.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"the disk of {place} is full; nothing was left behind. Free some space"
            ) from error
        raise
    if converter.differences:
        report.record("blocks", worst(converter.differences), rounding_tolerance(main_dtype))
    logger.info(str(report))
    return report


def _local(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; pass the folder of the model. GGUF files go through `from_gguf`.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json", *_COMPANIONS]))
    except (HfHubHTTPError, HFValidationError, FileNotFoundError) as error:
        message = f"{source} is no folder, and no model could be fetched by that name: {error}"
        raise FileNotFoundError(message) from error


def check_space(place: Path, needed: int) -> None:
    """Raise `OSError` where the disk has fewer bytes free than needed."""
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{place} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")


def write_companions(folder: Path, staging: Path, model: PreTrainedModel) -> None:
    """Write all but the weights: config, the files of the source that belong to it, and, for our classes, the code
    that loads them."""
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(staging, state_dict={})
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    (staging / SINGLE_NAME).unlink(missing_ok=True)
    if not (folder / "generation_config.json").exists():
        (staging / "generation_config.json").unlink(missing_ok=True)
    for path in sorted({path for pattern in _COMPANIONS for path in folder.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, staging / path.name)


class _Converter:
    """Walks over the checkpoint in the order of its layers; every step holds what it needs and no more."""

    def __init__(
        self,
        plan: UpcyclePlan,
        dense: PreTrainedModel,
        model: PreTrainedModel,
        checkpoint: SafetensorsFolder,
        dtype: torch.dtype | None,
    ) -> None:
        self.plan, self.model, self.checkpoint, self.dtype = plan, model, checkpoint, dtype
        self.differences: list[Difference] = []
        self.keys = stored_names(dense, checkpoint)
        jobs = {name: job for job in plan.jobs for name in job.sources.values()}
        missing = missing_names(dense, self.keys)
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors, the first is `{missing[0]}`. It is incomplete, or its "
                "config.json was changed; get both anew."
            )
        # A job stands where its first tensor does.
        steps = {job.key if (job := jobs.get(name)) else f"={name}": job or name for name in self.keys}
        self.steps: list[LayerJob | str] = list(steps.values())
        blocks = tuple(f"{job.gate.rpartition('.')[0].rpartition('.')[0]}." for job in self.plan.jobs)
        # What routers share is small; it is made at once and written last.
        self.shared = fill_parts(self.model, self.plan.options.seed, "cpu", skip=blocks)

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.checkpoint.infos[self.keys[name]].dtype
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.keys[name]).to(self._dtype(name))

    def infos(self) -> dict[str, TensorInfo]:
        """Names, types and shapes of all that will be written, under the names `save_pretrained` uses."""
        state = self.model.state_dict()
        found: dict[str, TensorInfo] = {}
        for step in self.steps:
            if isinstance(step, str):
                tensors = {step: state[step].to(self._dtype(step))}
            else:
                tensors = {name: tensor for name, tensor in state.items() if name.startswith(_prefixes(step))}
                down = self._dtype(step.sources["down.weight"])
                up = next(self._dtype(name) for role, name in step.sources.items() if not role.startswith("down"))
                made = {
                    step.up: up,
                    f"{step.up}_bias": up,
                    step.down: down,
                    f"{step.down}_bias": down,
                    step.gate: down,
                }
                if step.shared is not None:
                    made |= {f"{step.shared}.{step.up.rpartition('.')[2]}.{kind}": up for kind in ("weight", "bias")}
                    made |= {f"{step.shared}.down_proj.{kind}": down for kind in ("weight", "bias")}
                tensors = {name: tensor.to(made.get(name, tensor.dtype)) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                stored = self._stored(name, tensor)
                found |= {key: TensorInfo(part.dtype, tuple(part.shape)) for key, part in stored.items()}
        return found | {name: TensorInfo(part.dtype, tuple(part.shape)) for name, part in self.shared.items()}

    def run(self, writer: SafetensorsWriter, check: bool) -> None:
        """Write all tensors of the result, layer by layer. Each is let go of as soon as it is written."""
        with tqdm(total=len(self.plan.jobs), desc="Upcycling", unit="layer") as progress:
            for step in self.steps:
                tensors = {step: self._read(step)} if isinstance(step, str) else self._convert(step, check)
                for name in list(tensors):
                    for key, tensor in self._stored(name, tensors.pop(name)).items():
                        writer.write(key, tensor)
                        del tensor
                progress.update(isinstance(step, LayerJob))
        for name, tensor in self.shared.items():
            writer.write(name, tensor)

    def _stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor of the result as `save_pretrained` would store it (stock families: one tensor for each expert)."""
        return revert_weight_conversion(self.model, {name: tensor})

    @torch.no_grad()
    def _convert(self, job: LayerJob, check: bool) -> dict[str, torch.Tensor]:
        sources = {role: self._read(name) for role, name in job.sources.items()}
        tensors = self.plan.convert(job, sources)
        tensors = fill_created(self.model, job, self.plan.options.seed, tensors[job.gate]) | tensors
        if check:
            self.differences.append(self._compare(job, sources, tensors))
        return tensors

    def _compare(
        self, job: LayerJob, sources: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
    ) -> Difference:
        generator = torch.Generator().manual_seed(self.plan.options.seed)
        hidden = torch.randn(_TOKENS_MEASURED, job.hidden_size, generator=generator).to(sources["down.weight"].dtype)
        block = job.gate.removesuffix(".weight").rpartition(".")[0]
        own = {name.removeprefix(f"{block}."): tensor for name, tensor in tensors.items()}
        out = functional_call(self.model.get_submodule(block), own, (hidden[None],))
        out = out[0] if isinstance(out, tuple) else out
        return compare(job.read(sources).forward(hidden, job.activation), out.reshape(hidden.shape))


def _prefixes(job: LayerJob) -> tuple[str, ...]:
    gate, experts = job.gate.rpartition(".")[0], job.down.rpartition(".")[0]
    parts = f"{gate.rpartition('.')[0]}.moe_"
    return (f"{gate}.", f"{experts}.", parts, *job.zeros, *job.randoms)
