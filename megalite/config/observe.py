"""The sections `observe`, `profile` and `hooks`: what is done beside the steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from megalite import registry
from megalite.config.section import Choice, Section
from megalite.registry import Registry
from megalite.utils.urls import check_no_secret, check_webhook

if TYPE_CHECKING:
    from megalite.config.schema import Config
    from megalite.training.hooks import Hook
    from megalite.training.parts import RankModel
    from megalite.training.run import Run


class WandbConfig(Section):
    """Logging to Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="Whether it is sent, kept in the run's folder, or off."
    )
    project: str = Field("megalite", description="Project that the run is shown in.")
    entity: str | None = Field(None, description="User or team. null: the account's own.")
    group: str | None = Field(None, description="Group of the run. A sweep's trials have its name.")
    tags: tuple[str, ...] = Field((), description="Labels of the run.")


class MlflowConfig(Section):
    """Logging to an MLflow tracking server."""

    tracking_uri: str = Field(
        "",
        description="The server, such as http://mlflow:5000. Empty disables. Credentials come from the environment.",
    )
    experiment: str = Field("megalite", description="Experiment that the run is shown in.")

    @field_validator("tracking_uri")
    @classmethod
    def _server(cls, uri: str) -> str:
        # The config is written to checkpoints and trackers.
        check_no_secret(uri)
        if uri and not uri.startswith(("http://", "https://")):
            raise ValueError(
                "must be the http:// or https:// URL of a tracking server, which `mlflow server` starts"
            )
        return uri


class PrometheusConfig(Section):
    """Metrics of training for Prometheus, from the first rank."""

    port: int | None = Field(
        None, ge=1, le=65535, description="Port that answers to Prometheus. null: none."
    )
    textfile: Path | None = Field(
        None,
        description="File for node-exporter's textfile collector, ending in .prom. null: none.",
    )

    @field_validator("textfile")
    @classmethod
    def _as_collected(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError("must end in .prom: node-exporter reads no other file")
        return path


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness, evaluated by the model in training on its ranks."""

    names: tuple[str, ...] = Field(
        (), description="Names of tasks, groups or tags, or YAML files. Empty disables."
    )
    every: int = Field(
        1000, ge=0, description="Steps between evaluations. 0 evaluates at the end only."
    )
    include_path: Path | None = Field(None, description="Folder with more tasks.")
    limit: int | None = Field(
        None, gt=0, description="Documents of each task to evaluate. All where left out."
    )


class SamplesConfig(Section):
    """Answers of the model in training to fixed prompts, by its likeliest tokens."""

    prompts: tuple[str, ...] = Field((), description="Texts to go on with. Empty disables.")
    every: int = Field(100, ge=0, description="Steps between answers. 0 answers at the end only.")
    max_tokens: int = Field(64, gt=0, description="Length limit of an answer, in tokens.")


class ObserveConfig(Section):
    """What is logged and evaluated in training."""

    log_every: int = Field(
        1,
        gt=0,
        description="Steps between lines of a log file, each with the mean loss of the steps since the one before; "
        "metrics.jsonl has every step.",
    )
    eval_every: int = Field(
        100, ge=0, description="Steps between validations. 0 validates at the end only."
    )
    eval_batches: int = Field(
        20, gt=0, description="Global batches of one validation, the same ones every time."
    )
    layers_every: int = Field(
        0,
        ge=0,
        description="Steps between measurements of each layer: the norm of its gradients, the root mean square of its "
        "output, its largest attention logit, what fp8 makes zero. 0 disables.",
    )
    noise_scale_every: int = Field(
        0, ge=0, description="Steps between measurements of the gradient noise scale. 0 disables."
    )
    tasks: TasksConfig = TasksConfig()
    samples: SamplesConfig = SamplesConfig()
    target_rows: int = Field(
        0,
        ge=0,
        description="Validation rows whose targets an encoder-decoder gives at every validation, by the likeliest "
        "tokens, to be compared by BLEU, chrF and ROUGE. 0 disables.",
    )
    ladder: Path | None = Field(
        None,
        description="ladder.json of `megalite ladder`, which predicts this run's losses: loss.png shows the band, and "
        "a validation outside it is warned of.",
    )
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    webhook: str = Field(
        "",
        description="Address that is told when the run ends or dies, as Slack and Mattermost take it; $NAME takes it "
        "from that environment variable. Empty disables.",
    )
    tensorboard: bool = Field(False, description="Write the metrics for TensorBoard, too.")

    @field_validator("webhook")
    @classmethod
    def _keeps_secrets(cls, address: str) -> str:
        # Whoever has such an address may write to the channel behind it, and configs are in checkpoints.
        check_webhook(address)
        return address


class ProfileConfig(Section):
    """Traces of some steps, for chrome://tracing or https://ui.perfetto.dev."""

    steps: tuple[int, ...] = Field(
        (), description="Steps to record: [first, last]. Empty disables."
    )
    ranks: tuple[int, ...] = Field((0,), description="Ranks that write a trace.")
    memory: bool = Field(False, description="Also record every allocation.")
    tensors: tuple[int, ...] = Field(
        (),
        description="Steps whose weights and gradients are written to RUN/tensors, for `megalite parity`.",
    )

    @field_validator("steps")
    @classmethod
    def _first_and_last(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if len(steps) not in (0, 2) or (steps and not 1 <= steps[0] <= steps[1]):
            raise ValueError("must be [first, last] with 1 <= first <= last, or empty")
        return steps


class HookConfig(Choice):
    """Something that a plugin does beside the steps of a run."""

    name: str = Field(description="Which hook, as its plugin registers it.")

    KINDS: ClassVar[Registry[Any]] = registry.hooks

    def check(self, config: Config) -> None:
        """Raise ValueError, naming the setting, when the rest of a config does not go with this
        hook."""

    def build(self, run: Run, parts: RankModel) -> Hook:
        """Return this rank's hook."""
        raise NotImplementedError
