"""What a study file may say: a section `study`, which lays methods, seeds and ablations over a config file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.kinds import Allowed, NoneTwice, Real, Text
from neucore_plugin.config.loading import read_yaml
from neucore_plugin.config.section import Problems, Section

_OVERRIDES = "a mapping of config keys to values, such as {model.arch: cir_baseline, run.max_epoch: 5}"
Overrides = Annotated[dict[str, Any], Allowed(_OVERRIDES)]
_NAMED = Allowed("a mapping of a name to config keys with their values")
Named = Annotated[dict[Text, dict[str, Any] | None], _NAMED]
Points = Annotated[dict[Text, Real], Allowed("a mapping of a split to percentage points")]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    NoneTwice,
    Field(min_length=1),
    Allowed("a list of whole numbers of at least 0, none twice"),
]
NAMES = Annotated[list[Text], NoneTwice]


class GoalsSchema(Section):
    """What the summary checks, line by line."""

    metric: Text = Field("R@1", description="the metric of all goals")
    ahead: Points = Field(
        {}, description="{split: points that the main method's mean is to be above the best other method's}"
    )
    spreads: Real = Field(
        2.0, ge=0, description="each lead is to be above this many spreads (of the two methods' the larger)"
    )
    removal_costs: Real | None = Field(
        None, description="points that each ablation is to cost on one split of `ahead` at least; null: not asked"
    )


class QuickSchema(Section):
    """What `--quick` takes instead: less of everything."""

    methods: NAMES | None = Field(None, description="names of methods; null: all")
    ablations: NAMES | None = Field(None, description="names of ablations; null: all")
    curves: NAMES | None = Field(None, description="names of curves; null: all")
    seeds: Seeds | None = Field(None, description="seeds; null: all")
    minutes: Real | None = Field(None, gt=0, description="in place of the study's")
    options: Overrides = Field({}, description="config keys laid over those of every trial")


class StudySchema(Section):
    """Methods x seeds, ablations and learning curves over one config file."""

    base: Text = Field(description="the config of every trial: a file (relative to this one), or a shipped one's name")
    options: Overrides = Field({}, description="config keys laid over the base in every trial")
    output_dir: Text = Field("output/study", description="folder of the trials and of the summary")
    methods: Named = Field(min_length=1, description="{name: config keys laid over the base}")
    main: Text | None = Field(None, description="the method that the others are compared with; null: the first")
    seeds: Seeds = Field([1, 2, 3, 4, 5], description="values of run.seed; each method is trained with each")
    ablations: Named = Field({}, description="{name: config keys laid over the main method's}")
    curves: Named = Field({}, description="{name: config keys}: each method once more with each, the first seed alone")
    minutes: Real | None = Field(
        None,
        gt=0,
        description="processor time of each training, from which the epochs of each method follow; null: the config's "
        "epochs",
    )
    goals: GoalsSchema = Field(default_factory=GoalsSchema, description="what the summary checks")
    quick: QuickSchema = Field(default_factory=QuickSchema, description="what --quick takes instead")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.main is not None and self.main not in self.methods:
            yield "main", f"got {self.main!r}, which is no method.{nearest(self.main, self.methods)}"
        for name in self.ablations:
            if name in self.methods:
                yield f"ablations.{name}", "is the name of a method too; each needs its own"
        for part in ("methods", "ablations", "curves"):
            known = getattr(self, part)
            for name in getattr(self.quick, part) or ():
                if name not in known:
                    yield f"quick.{part}", f"got {name!r}.{nearest(name, known)}"


def read_study(path: str | Path) -> StudySchema:
    """The checked study of a yaml file, or of the shipped one of that name. Raises a ConfigError with all problems."""
    content = read_yaml(path)
    if "study" not in content:
        raise ConfigError(
            f"{path} is no study: it has no section `study`. A study names a config as its `base`, and methods; "
            "`neucore configs copy study_emoji` writes one to start from"
        )
    problems = Problems()
    for key in content:
        if key != "study":
            problems.add(str(key), "stands outside of `study`; config keys belong to study.options, or into the base")
    given = content["study"]
    if not isinstance(given, Mapping):
        raise ConfigError(f"study {path}: the section `study` must be a mapping")
    with problems.at("study"):
        study = StudySchema.model_validate(dict(given), context=problems)
    problems.raise_all(f"study {path}")
    return study
