"""The options of `build`, `verify`, `compile_engines`, `evaluate` and `train`: a frozen class each.

An option has the meaning of the command's option of that name. None leaves the choice to us. A
value of another type is a ConfigError.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from varedit_engines.engine_compiler import EngineCompiler, Flags, check_compiler
from varedit_runtime.backends import DEFAULT, ChosenBackend
from varedit_runtime.backends.auto import AUTO, AutoBackend
from varedit_runtime.backends.engines.engine_set import EngineLayout
from varedit_runtime.backends.engines.import_tensorrt import EngineKind
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, shown
from varedit_runtime.grids import Conditioning
from varedit_runtime.values import AnyPath, CheckedOptions

MOST = 2**31 - 1  # of steps, pairs, seeds
TrainPrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class BuildOptions(CheckedOptions):
    """The bundle to build, its weights, and its folder."""

    # The model: a size and resolutions, or instead of them the config.json of a recording.
    size: str | None = None  # nano, 2b or 8b, or a size for tests: 125m, tiny-2b, ...
    resolutions: tuple[int, ...] = ()  # 256, 512, 1024 px: a variant each; nano has its own
    aspect: str = "1:1"  # height:width of all variants, one of varedit_runtime.grids.ASPECT_RATIOS
    config: AnyPath | None = None  # a recording's config.json
    # How blocks see the source, as the checkpoint was trained; see the reference's config.py.
    conditioning: Conditioning = "sar"

    # The weights: all checkpoints, or a seed. nano needs neither. With `config`, text_encoder may
    # be left out: the bundle then starts at text features.
    # Each is a path, or hf://OWNER/REPOSITORY/PATH[@REVISION]. 2b and 8b are published: what is not
    # given is looked for in the repository or folder `source`, by default their authors'.
    checkpoint: AnyPath | None = None  # the transformer: a .pth, a .safetensors, a folder of shards
    prefer_ema: bool = False  # of a training's checkpoint: the average of its weights (EMA)
    tokenizer: AnyPath | None = None  # the picture tokenizer: infinity_vae_*.pth
    text_encoder: AnyPath | None = None  # the folder or repository of flan-t5-xl
    source: str | None = None  # OWNER/REPOSITORY or a folder
    # LoRA adapters to merge into the transformer, each a place with or without a scale:
    # style.safetensors, style.safetensors:0.8, hf://OWNER/REPOSITORY, a folder of PEFT's.
    loras: tuple[AnyPath, ...] = ()
    random_weights: int | None = None  # the seed of random weights, for structure, speed and size

    # What is compiled into the graphs.
    # One of varedit_runtime.precision.PRECISIONS, or auto: fp16 where the best backend of this
    # machine runs on a GPU, else fp32.
    precision: str = AUTO
    # The most pictures at a time. Engines compute as many, whatever there is to do; ONNX Runtime
    # takes fewer at a cost in proportion, and on a CPU gains nothing by more.
    batch: int = 1
    text_tokens: int | None = None  # most tokens of an instruction; by default 128, for nano 48
    guided: bool = True  # with the unconditional rows that guidance needs
    fused_attention: bool = False  # with a graph that ONNX Runtime runs faster on CUDA

    # A bundle of the same model, variants and precision, whose graphs, and engines without weights
    # inside, are taken over: nothing is traced, and the weights alone are new. "auto" is then its
    # precision.
    graphs_from: AnyPath | None = None

    # The bundle's folder; by default SIZE-RESOLUTIONS[-PRECISION] among the user's own bundles.
    output: AnyPath | None = None

    @property
    def for_graphs(self) -> "BuildOptions":
        """The options with the precision of `graphs_from`, if it is given, in place of "auto".

        Raises BundleError if it is no bundle.
        """
        if self.graphs_from is None or self.precision != AUTO:
            return self
        return replace(self, precision=Bundle.open(self.graphs_from).manifest.precision)


@dataclass(frozen=True)
class EngineOptions(Flags):
    """The engines to compile from a bundle, and by keyword the compiler's settings (`Flags`)."""

    backend: EngineKind = "tensorrt"  # or tensorrt-rtx, which compiles without a GPU
    variant: str | None = None  # whose graphs; by default the bundle's first variant

    # Where the weights are: external, as inputs of the engines; profiles, inside one engine with a
    # profile per scale; baked, inside one engine per scale.
    layout: EngineLayout = "external"

    # GPUs to compile for, as in "sm89"; tensorrt-rtx alone. By default this machine's GPU.
    architectures: tuple[str, ...] = ()

    again: bool = False  # whether to recompile engines that were built on this machine

    def check(self) -> None:
        """Raise ConfigError on options that the backend does not have, installed or not."""
        check_compiler(self.backend, self.architectures, self._flags)

    def compiler(self) -> EngineCompiler:
        """Check all options and return the compiler for them.

        Raises MissingExtraError if the backend is not installed, ConfigError on options that the
        backend does not have, BackendError if there is no GPU and no architecture was named.
        """
        return EngineCompiler(self.backend, self.architectures, self._flags)

    @property
    def _flags(self) -> Flags:
        return Flags(**{field.name: getattr(self, field.name) for field in fields(Flags)})


@dataclass(frozen=True)
class VerifyOptions(CheckedOptions):
    """The things to compare a bundle with."""

    golden: AnyPath | None = None  # a recording that the bundle was built from

    # The graphs are always compared as ONNX Runtime runs them on the CPU. Another backend is
    # compared too, as it runs on this machine: its name, or varedit_runtime.backends.choose(...)
    # with its options.
    backend: str | ChosenBackend = DEFAULT
    variant: str | None = None  # the variant that it runs; by default the bundle's first


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(CheckedOptions):
    """A judge: a model that takes pictures, behind an OpenAI-compatible chat endpoint.

    Its key is taken from the environment, VAREDIT_JUDGE_KEY.
    """

    judge: str | None = None  # the address, such as http://127.0.0.1:8000/v1
    judge_model: str | None = None  # the model's name there
    judge_repeat: int = 1  # answers about each edit, which are averaged and compared
    judge_at_once: int = 8  # edits that it is asked about at the same time
    judge_prompts: AnyPath | None = None  # a folder of prompts in place of ours, by their names
    judge_price: tuple[float, float] | None = None  # of a million tokens in, and out


@dataclass(frozen=True)
class FilterOptions(JudgedOptions):
    """Which pairs to learn from are judged, and which of them are kept."""

    data: tuple[AnyPath, ...]  # the places that `pairs.read_pairs` takes
    output: AnyPath  # the new list, a .jsonl: a new one, or that of the same data
    least: float = 7.0  # of 10: the score that match, source and target of a kept pair have


@dataclass(frozen=True)
class EvaluateOptions(JudgedOptions):
    """What a bundle is evaluated on, and how it edits."""

    benchmark: str  # one of varedit_export.evaluation.benchmarks.BENCHMARKS
    output: AnyPath  # the run's folder: a new one, or that of the same run
    data: AnyPath | None = None  # the data set's folder, or hf://datasets/OWNER/REPOSITORY

    metrics: tuple[str, ...] = ()  # families of metrics; by default the benchmark's
    weights: tuple[str, ...] = ()  # METRIC=PLACE: a folder, or hf://OWNER/REPOSITORY
    seed: int = 0  # edit i has seed + i
    limit: int | None = None  # edits to make, of all types alike; by default all
    fail_below: tuple[str, ...] = ()  # SCORE=NUMBER: the overall mean that is good enough

    # How the bundle edits, and what it is compared with: another bundle, a backend's name, or the
    # folder of a run.
    against: AnyPath | None = None
    backend: str | ChosenBackend | AutoBackend = AUTO
    variant: str | None = None  # by default the bundle's first
    guidance_scale: float | None = None  # by default the bundle's own
    temperature: float | None = None
    fast: bool = False  # no guidance at the last two scales
    ray: bool = False  # edit on the Ray cluster of RAY_ADDRESS, or a new one of this machine


@dataclass(frozen=True)
class TrainOptions(CheckedOptions):
    """What is fine-tuned, on which pairs, and how."""

    # The model and its weights, as `build` takes them.
    size: str
    data: tuple[AnyPath, ...]  # places of pairs: files, folders, or hf://datasets/OWNER/REPOSITORY
    output: AnyPath  # the run's folder: a new one, or that of the same run
    resolution: int | None = None  # 256, 512 or 1024 px; nano has its own
    checkpoint: AnyPath | None = None
    prefer_ema: bool = False
    tokenizer: AnyPath | None = None
    text_encoder: AnyPath | None = None
    source: str | None = None
    random_weights: int | None = None  # the seed of random weights, to try out memory and speed
    cache: AnyPath | None = None  # folder of the pairs' tokens; by default in that of the run

    # How it learns, on every machine alike.
    lora: int | None = None  # rank of each product's change; by default all weights are trained
    steps: int = 1000
    batch: int = 32  # pairs of a step
    # After the warmup. By default the paper's, 6e-5, and 1.875e-5 from 512 px on; ten times that
    # with LoRA.
    learning_rate: float | None = None
    seed: int = 0  # of the order of pairs, and of all that is random
    held_out: int = 8  # most pairs that are not learned from, but a tenth; their loss is reported

    # How it is computed.
    precision: TrainPrecision = "auto"  # of products; auto: bf16 on a GPU
    at_once: int = 1  # pairs that one process computes at a time; gradients are summed
    keep_activations: bool = False  # faster, and takes more memory; by default computed again

    # Steps between lines of the log, between checkpoints, and between sheets of pictures.
    log_every: int = 10
    save_every: int = 200
    report_every: int = 500

    def __post_init__(self) -> None:
        """Raise ConfigError on values of other types, or out of range."""
        super().__post_init__()
        counts = {
            "--lora": 1 if self.lora is None else self.lora,
            "--steps": self.steps,
            "--batch": self.batch,
            "--at-once": self.at_once,
            "--log-every": self.log_every,
            "--save-every": self.save_every,
            "--report-every": self.report_every,
        }
        for name, count in counts.items():
            if not 1 <= count <= MOST:
                raise ConfigError(f"{name} is {shown(count)}: give 1 to {MOST}")
        if not (0 <= self.seed <= MOST and 0 <= self.held_out <= MOST):
            raise ConfigError(f"--seed and --held-out: give 0 to {MOST}")
        rate = self.learning_rate
        if rate is not None and not 0 < rate <= 1:
            raise ConfigError(f"--learning-rate is {rate:g}: give more than 0, at most 1")
        if not self.data:
            raise ConfigError("--data: give a file or folder of pairs")

    @property
    def build_options(self) -> BuildOptions:
        """The same model and weights, as options of a build."""
        return BuildOptions(
            size=self.size,
            resolutions=() if self.resolution is None else (self.resolution,),
            checkpoint=self.checkpoint,
            prefer_ema=self.prefer_ema,
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            source=self.source,
            random_weights=self.random_weights,
            precision="fp32",
        )
