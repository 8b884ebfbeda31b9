"""The schema of a config, and the error messages for one that cannot be used."""

from megalite.config.data import AugmentConfig, DataConfig, FillInTheMiddleConfig, Source, names_of
from megalite.config.kernels import KernelsConfig, implementations
from megalite.config.model import (
    ANSWER_LABELS,
    MOST_LAYERS,
    NUM_LABELS,
    LoraConfig,
    ModelConfig,
)
from megalite.config.objective import DataKind, Lengths, ObjectiveConfig
from megalite.config.observe import (
    HookConfig,
    ObserveConfig,
    ProfileConfig,
    TasksConfig,
    WandbConfig,
)
from megalite.config.optimizer import (
    BY_COUNTS,
    EMA,
    Member,
    OptimizerConfig,
    ParameterGroup,
    QKClipConfig,
    ScheduleConfig,
    Treatment,
)
from megalite.config.parallel import OffloadConfig, ParallelConfig
from megalite.config.run import CheckpointConfig, HealthConfig, Policy, RunConfig
from megalite.config.schema import Config
from megalite.config.section import Choice, Section
from megalite.config.train import (
    FP8_BLOCK,
    BatchRampConfig,
    FakeQuantizeConfig,
    Fp8Config,
    TrainConfig,
)

__all__ = [
    "ANSWER_LABELS",
    "BY_COUNTS",
    "EMA",
    "FP8_BLOCK",
    "MOST_LAYERS",
    "NUM_LABELS",
    "AugmentConfig",
    "BatchRampConfig",
    "CheckpointConfig",
    "Choice",
    "Config",
    "DataConfig",
    "DataKind",
    "FakeQuantizeConfig",
    "FillInTheMiddleConfig",
    "Fp8Config",
    "HealthConfig",
    "HookConfig",
    "KernelsConfig",
    "Lengths",
    "LoraConfig",
    "Member",
    "ModelConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroup",
    "Policy",
    "ProfileConfig",
    "QKClipConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "Source",
    "TasksConfig",
    "TrainConfig",
    "Treatment",
    "WandbConfig",
    "implementations",
    "names_of",
]
