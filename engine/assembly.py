"""From a run configuration to its parts: rows, data, model, optimizer. Everything that can be wrong is found here,
before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, deepspeed_config
from engine.config import RunConfig, load_tasks, records_steps
from engine.graphs import Graphs, refuse_without_gpu
from engine.model.heads import HeadSpec
from engine.model.published import load_bert, load_published, read_state
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer, OptimizerSettings
from engine.ranks import Ranks
from engine.slices import units
from engine.step import Plain, Stepper
from engine.tasks import HeadRow, Table, TaskRow, base_lr, loss_scale, task_tokens
from engine.validation import Validated, validate
from kernels import backends, heap
from pipelines import dali
from pipelines.answers import Answers
from pipelines.batch import Batch
from pipelines.buckets import Grid
from pipelines.datasets import DataSpec, TaskData, load_task
from pipelines.division import Division
from pipelines.errors import BadInput
from pipelines.held_out import HeldOut, held_out
from pipelines.loader import BatchSource, TrainingSource, validation_batches
from pipelines.masking import Masking
from pipelines.overlap import TRAINED_ON
from pipelines.pretraining import check_classes
from pipelines.resident import Resident
from pipelines.sampler import Sampler
from pipelines.sheet import Sheet, load_sheet
from pipelines.wordpiece import WordPiece

VERIFIED_AT_START = 2 * 2**30
"""Bytes of a feature store up to which every record is tested before the first step."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Task:
    """One task of a run: its row, its data, its place among the others."""

    row: TaskRow
    token: int | None
    loss_scale: float
    train: TrainingSource
    val: TaskData

    @property
    def epoch_iterations(self) -> int:
        """n_t of Algorithm 1."""
        return self.train.sampler.batches_per_epoch


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    config: RunConfig
    table: Table
    tasks: dict[str, Task]
    model: ViLBERT
    stepper: Stepper
    device: torch.device
    ranks: Ranks

    @property
    def optimizer(self) -> Optimizer:
        """Of a run in one process without DeepSpeed."""
        assert isinstance(self.stepper, Plain)
        return self.stepper.optimizer

    def training(self) -> Mapping[str, BatchSource]:
        """Each task's training batches by step, by the configured way; those of DALI are on the device already."""
        if self.config.data_path == "plain":
            return {name: task.train for name, task in self.tasks.items()}
        raw = {name: task.train.raw for name, task in self.tasks.items()}
        return dali.Stage(raw, DTYPES[self.config.precision], self.device).sources()

    def validation(self, task: Task, blind: bool | None = None) -> Iterator[Batch]:
        """The task's validation batches; `blind` overrides the run's own setting."""
        return validation_batches(
            task.val,
            task.row.batch * self.config.validation.batch_factor,
            seed=self.config.seed,
            task_token=task.token,
            dtype=DTYPES[self.config.precision],
            share=self.config.share_prefixes,
            blind=self.config.blind if blind is None else blind,
            max_examples=self.config.validation.max_examples,
            masking=task.train.masking,
            resident=task.train.resident,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def validate(
        self, task: Task, blind: bool | None = None, stop_asked: Callable[[], bool] = lambda: False
    ) -> Validated:
        """The score of all ranks on the task's validation data; every rank must ask. See `engine.validation.validate`."""
        with self.stepper.whole():
            return validate(
                self.model, self.validation(task, blind), task.row.head, self.device, self.config.share_prefixes,
                stop_asked, self.ranks, self._validation_rounds(task),
            )  # fmt: skip

    def _validation_rounds(self, task: Task) -> int:
        """How many batches the rank with most of them gets of `validation`."""
        limit = self.config.validation.max_examples or len(task.val)
        batches = -(-min(len(task.val), limit) // (task.row.batch * self.config.validation.batch_factor))
        return -(-batches // self.ranks.world_size)


def assemble(config: RunConfig, say: Callable[[str], None] = lambda message: None, ranks: Ranks | None = None) -> Parts:
    """Build a run's parts. Raises BadInput naming the file, key or record that cannot be used."""
    table, rows = load_tasks(config)
    ranks = ranks or Ranks()
    sharded = _is_sharded(config, ranks)
    device = device_of(config, ranks)
    # What contradicts the run is said before anything is read.
    stage = deepspeed_config.stage_of(_deepspeed_settings(config, ranks, device)) if sharded else 0
    config = config.model_copy(update={"cuda_graphs": _records_steps(config, rows, device, stage, say)})
    if config.logging.nvtx and device.type != "cuda":
        what = f"ranges are for NVIDIA's profilers, and this run is on {device}"
        raise BadInput("logging.nvtx", what, "logging.nvtx=false")
    if config.data_path == "dali":
        dali.check_installed()
    _check_beginnings(config)
    use_kernels(config, device, say)
    sheet = load_sheet(sheet_path(config, say), [row.name for row in rows])
    tokenizer = WordPiece.load(sheet.vocabulary)
    if len(tokenizer) > config.model.vocab_size:
        raise BadInput(
            "model.vocab_size", f"{config.model.vocab_size}, but {sheet.vocabulary} has {len(tokenizer)} entries"
        )
    answers = shared_answers(rows, sheet)
    held = test_images(config, table, rows, sheet, say)
    tokens, scales = task_tokens(config.task_tokens, rows), loss_scale(rows)
    tasks = {}
    for row in rows:
        say(f"reading {row.title}")
        train, val = _read(row, table, held, tokenizer, answers, config, tokens[row.name])
        train = replace(train, division=Division(ranks.rank, ranks.world_size, row.accumulation))
        held.settle(train.data)
        held.settle(val)
        tasks[row.name] = Task(row, tokens[row.name], scales[row.name], train, val)
    if held.path is not None:
        say(held.told([task.train.data for task in tasks.values()], [task.val for task in tasks.values()]))
    _verify_stores(tasks, say)
    if config.resident_features:
        tasks = _with_resident_features(tasks, config, device, say)
    model = build_model(config, table, rows, answers, say).to(device)
    stepper = build_stepper(config, rows, model, device, ranks, sharded)
    return Parts(config, table, tasks, model, stepper, device, ranks)


def _is_sharded(config: RunConfig, ranks: Ranks) -> bool:
    """Whether DeepSpeed runs it. Raises BadInput for what only the other backend can do."""
    sharded = config.backend == "deepspeed" or (
        config.backend == "auto" and (ranks.world_size > 1 or config.deepspeed is not None)
    )
    if ranks.world_size > 1 and not sharded:
        raise BadInput("backend: plain", f"one process only, and there are {ranks.world_size}", "backend: deepspeed")
    if config.precision == "float16" and not sharded:
        raise BadInput("precision: float16", "only DeepSpeed scales its loss", "backend: deepspeed, or bfloat16")
    return sharded


def _check_beginnings(config: RunConfig) -> None:
    """What a run begins from is there: found before hours of annotations are read."""
    for key, wanted in (
        ("initial_weights", "the folder of a run, a checkpoint of it"),
        ("initial_text", "BERT's folder"),
    ):
        value = getattr(config, key)
        if value is not None and not Path(value).exists():
            raise BadInput(
                f"{key}: {value}", "no such file or folder", f"give {wanted}, or a .safetensors or .bin file"
            )


def _records_steps(
    config: RunConfig, rows: tuple[TaskRow, ...], device: torch.device, stage: int, say: Callable[[str], None]
) -> bool:
    """Whether steps are recorded as CUDA graphs. BadInput where they were asked for and cannot be."""
    if not records_steps(config, device.type):
        return False
    try:
        refuse_without_gpu(device)
        _refuse_without_buckets(rows)
        _refuse_divided(rows, stage)
        _refuse_in_pieces(config)
    except BadInput as error:
        if config.cuda_graphs != "auto":
            raise
        say(f"no CUDA graphs, so a GPU may wait for its host's launches for most of a step. {error}")
        return False
    return True


def _refuse_divided(rows: tuple[TaskRow, ...], stage: int) -> None:
    if stage:
        what = (
            f"ZeRO stage {stage} reduces gradients while backward runs, and a recorded backward knows nothing of that"
        )
        raise BadInput(
            "cuda_graphs", what, "deepspeed: zero0, which keeps 12 bytes a parameter on each GPU, or cuda_graphs: false"
        )
    for row in rows:
        if row.accumulation > 1:
            what = f"{row.name} has accumulation {row.accumulation}, and a graph holds a whole batch"
            raise BadInput("cuda_graphs", what, "cuda_graphs: false")


def _refuse_in_pieces(config: RunConfig) -> None:
    if config.data_path == "dali":
        what = "data_path: dali makes features on the device, apart from the piece of memory that a graph reads its batch from"
        raise BadInput("cuda_graphs", what, "data_path: plain, or cuda_graphs: false")


def _refuse_without_buckets(rows: tuple[TaskRow, ...]) -> None:
    for row in rows:
        if row.loss == "masked":
            what = f"{row.name}: what pretraining hides differs in number from batch to batch, and has no shape buckets"
            raise BadInput("cuda_graphs", what, "cuda_graphs: false")


def data_spec(row: TaskRow, head: HeadRow) -> DataSpec:
    """What the pipelines need to know of a task."""
    return DataSpec(
        name=row.name, reader=row.reader, number=row.number, max_tokens=row.max_tokens, max_regions=row.max_regions,
        images=row.images, target=row.loss, options=head.options or 1,
    )  # fmt: skip


def sheet_path(config: RunConfig, say: Callable[[str], None]) -> Path:
    """The run's data sheet; the embedded world is built on first use."""
    if config.data != "world":
        return Path(config.data)
    from pipelines.world import ensure  # the renderer is needed by the embedded world only

    say(f"embedded world in {config.world.path} (built on first use)")
    return ensure(Path(config.world.path), seed=config.world.seed, size=config.world.size)


def test_images(
    config: RunConfig, table: Table, rows: tuple[TaskRow, ...], sheet: Sheet, say: Callable[[str], None]
) -> HeldOut:
    """The test images of all data sets of the sheet, those that this run does not train included."""
    if config.unclean_data == "allow":
        say("unclean_data=allow: images that other data sets test on stay in training")
        return HeldOut(sheet)
    readers = {name: row.reader for name, row in table.tasks.items()}
    return held_out(sheet, readers, [row.name for row in rows], say)


def _read(
    row: TaskRow,
    table: Table,
    held: HeldOut,
    tokenizer: WordPiece,
    answers: dict[str, Answers],
    config: RunConfig,
    token: int | None,
) -> tuple[TrainingSource, TaskData]:
    spec, sheet = data_spec(row, table.head(row)), held.sheet
    train, val = (
        load_task(spec, sheet, split, tokenizer, answers=answers.get(row.head), removed=held.keys(row.name, split))
        for split in TRAINED_ON
    )
    for data in (train, val):
        if data.target is None and row.loss not in ("options", "masked"):
            raise BadInput(f"{sheet.path}: sets.{row.name}.{data.split}", "its annotations hold no answers",
                           "train and validate on splits that publish theirs")  # fmt: skip
    width = train.store.feature_dim
    if width != config.model.v_feature_size:
        raise BadInput(
            train.store.path, f"features of {width} values, model.v_feature_size is {config.model.v_feature_size}"
        )
    sampler = Sampler(len(train), row.batch, config.seed, row.number)
    grid = Grid.fitting(config.model.max_position_embeddings) if config.cuda_graphs else None
    masking = None
    if row.loss == "masked":
        masking = Masking(mask_token=tokenizer.mask, vocabulary=len(tokenizer), **config.masking.model_dump())
        for data in (train, val):
            check_classes(data, config.model.v_target_size)
    return TrainingSource(
        train, sampler, token, DTYPES[config.precision], config.share_prefixes, config.blind, grid, masking,
        config.data_threads,
    ), val  # fmt: skip


def _with_resident_features(
    tasks: dict[str, Task], config: RunConfig, device: torch.device, say: Callable[[str], None]
) -> dict[str, Task]:
    for name, task in tasks.items():
        if task.row.loss == "masked":
            what = f"{name}: pretraining changes the features of every batch, so they cannot stay as they are"
            raise BadInput("resident_features", what, "resident_features: false")
    datas = [data for task in tasks.values() for data in (task.train.data, task.val)]
    resident = Resident.of(datas, DTYPES[config.precision], device)
    say(f"features on {device}: {resident.table.nbytes / 2**20:,.1f} MiB")
    return {name: replace(task, train=replace(task.train, resident=resident)) for name, task in tasks.items()}


def _verify_stores(tasks: dict[str, Task], say: Callable[[str], None]) -> None:
    """Damage is found now where that costs seconds; larger stores are tested record by record as they are read."""
    used = [store for task in tasks.values() for data in (task.train.data, task.val) for store in data.stores]
    for store in dict.fromkeys(used):
        if store.nbytes <= VERIFIED_AT_START:
            store.verify_records()
        else:
            say(f"{store.path}: {store.nbytes / 2**30:.0f} GiB, tested as it is read (stopgo check tests it whole)")


def shared_answers(rows: tuple[TaskRow, ...], sheet: Sheet) -> dict[str, Answers]:
    """The answer vocabulary of each answer head; tasks that share a head must share it."""
    found: dict[str, tuple[str, Answers]] = {}
    for row in rows:
        path = sheet.entry(row.name).answers if row.loss == "soft_labels" else None
        if path is None:
            continue
        answers = Answers.load(path)
        other, known = found.setdefault(row.head, (row.name, answers))
        if [known.answer(i) for i in range(len(known))] != [answers.answer(i) for i in range(len(answers))]:
            raise BadInput(f"{sheet.path}: sets.{row.name}.answers", f"differs from that of {other}, with which it shares "
                           f"the head {row.head}", "give both the same vocabulary")  # fmt: skip
    return {head: answers for head, (_, answers) in found.items()}


def head_specs(table: Table, rows: tuple[TaskRow, ...], answers: Mapping[str, Answers]) -> dict[str, HeadSpec]:
    """Kind and size of each head that these rows need, pretraining's aside. `answers`: of each answer head."""
    specs = {}
    for row in rows:
        head = table.head(row)
        if head.kind != "masked":
            outputs = len(answers[row.head]) if head.kind == "answers" else head.classes or 1
            specs[row.head] = HeadSpec(head.kind, outputs)
    return specs


def build_model(
    config: RunConfig, table: Table, rows: tuple[TaskRow, ...], answers: dict[str, Answers], say: Callable[[str], None]
) -> ViLBERT:
    """The model with the heads that these rows need, and the weights that the run begins from."""
    specs = head_specs(table, rows, answers)
    model = ViLBERT(config.model, specs, pretraining=any(row.loss == "masked" for row in rows))
    model.initialise(config.seed)
    if config.initial_text is not None:
        count = load_bert(model, Path(config.initial_text))
        say(f"text stream from {config.initial_text}: {count} tensors")
    if config.initial_weights is not None:
        path = Path(config.initial_weights)
        ours = (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()
        state = checkpoint.weights(path) if ours else read_state(path)
        fresh = load_published(model, state, path, config.fresh_weights)
        say(f"weights from {path}" + (f"; new: {', '.join(fresh)}" if fresh else ""))
    return model


def build_stepper(
    config: RunConfig, rows: tuple[TaskRow, ...], model: ViLBERT, device: torch.device, ranks: Ranks, sharded: bool
) -> Stepper:
    """The model's update rule. Brings the float32 model to the run's precision; masters keep what rounding takes."""
    graphs = Graphs(model, device) if records_steps(config, device.type) else None
    if not sharded:
        return Plain(model, build_optimizer(config, rows, model), device, config.share_prefixes, graphs)
    from engine.sharded import Sharded  # DeepSpeed takes seconds to import

    settings = _deepspeed_settings(config, ranks, device)
    exact = _rounded(config, model)
    share = config.share_prefixes
    return Sharded(model, _settings(config), _rates(config, rows, model), exact, settings, ranks, device, share, graphs)


def _deepspeed_settings(config: RunConfig, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is given. Raises BadInput where its JSON and the run say different things."""
    return deepspeed_config.merged(
        config.deepspeed if config.deepspeed is not None else deepspeed_config.read("zero1"),
        precision=config.precision,
        clip=config.optimizer.clip,
        world_size=ranks.world_size,
        device=device.type,
    )


def build_optimizer(config: RunConfig, rows: tuple[TaskRow, ...], model: ViLBERT) -> Optimizer:
    """The optimizer of one process. See `build_stepper`."""
    exact = _rounded(config, model)
    optimizer = Optimizer(model, _settings(config), _rates(config, rows, model))
    optimizer.take_masters(exact)
    return optimizer


def _settings(config: RunConfig) -> OptimizerSettings:
    return OptimizerSettings(**config.optimizer.model_dump(exclude={"base_lr", "head_lr"}))


def _rates(config: RunConfig, rows: tuple[TaskRow, ...], model: ViLBERT) -> dict[str, float]:
    """The rate of each unit: the published `vil_*` heads have their own."""
    base = config.optimizer.base_lr or base_lr(rows)
    return {unit: (config.optimizer.head_lr if unit.startswith("vil_") else None) or base for unit in units(model)}


def _rounded(config: RunConfig, model: ViLBERT) -> dict[nn.Parameter, Tensor]:
    """The float32 values of parameters that are rounded here to the run's precision."""
    if config.precision == "float32":
        return {}
    exact = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    model.to(DTYPES[config.precision])
    return exact


def use_kernels(config: RunConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Take the run's choice of backends, and say in one line what every op uses. On the CPU also `heap.keep`."""
    if device.type == "cpu":
        heap.keep()
    backends.use(config.kernels)
    try:
        by_backend = backends.grouped(backends.report(device))
    except backends.UnusableBackend as error:
        raise BadInput("kernels", str(error)) from None
    main = max(by_backend, key=lambda name: len(by_backend[name]))
    rest = [f"{name}: {', '.join(ops)}" for name, ops in by_backend.items() if name != main]
    say("; ".join([f"kernels: {main}", *rest]))


def device_of(config: RunConfig, ranks: Ranks | None = None) -> torch.device:
    """The run's device; also sets the number of CPU threads. BadInput where CUDA is asked for and there is none."""
    ranks = ranks or Ranks()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif ranks.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "device", "cuda asked for, but torch sees no GPU", "device=cpu, or install torch for your driver"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.world_size == 1:
        return torch.device("cuda")
    if ranks.local_rank >= torch.cuda.device_count():
        what = f"local rank {ranks.local_rank}, but this machine shows {torch.cuda.device_count()} GPUs"
        raise BadInput("environment: LOCAL_RANK", what, "start one process per GPU")
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)
