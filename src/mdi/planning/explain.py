"""A plan in words and shares, for people who ask why their machines got what they have."""

from __future__ import annotations

from mdi.core.quantization import ModelQuantization
from mdi.core.status import PlanStatus, StagePart, StageStatus
from mdi.models.config import ModelConfig, StageSpec
from mdi.planning.plan import Plan
from mdi.planning.predict import stage_summary

ALONE = "one node has the whole model"
EVEN = "each node reads as equal a part of the weights as whole layers allow: the machines are taken to be alike"
GIVEN = "the layers of each node were given (--layers, or layers in the nodes-config)"
GROUPED = "the nodes of each stage were given (--groups, --tensor-parallel-size, or group in the nodes-config)"
CHOSEN = "the machines were measured, and this is the best plan by the times that are predicted"
FOUND = "the chunks that were prepared earlier are split so: mdi prepare makes new ones"


def explain(plan: Plan, config: ModelConfig, dtype: str, quantization: ModelQuantization, reason: str) -> PlanStatus:
    """The plan of a running server. dtype: of the stages. reason: one of this module's."""
    places = [(group, rank) for group, size in enumerate(plan.groups) for rank in range(size)]
    stages = tuple(
        StageStatus(
            name,
            spec.first_layer,
            spec.last_layer,
            _parts(spec),
            round(stage_summary(config, spec, dtype, quantization=quantization).step_share, 4),
            group,
            rank,
            spec.rank,
        )
        for (name, spec), (group, rank) in zip(plan.roles.items(), [*places, (None, None)], strict=False)
    )
    return PlanStatus(config.n_layers, reason, stages)


def _parts(spec: StageSpec) -> tuple[StagePart, ...]:
    held: tuple[tuple[StagePart, bool], ...] = (
        ("embedding", spec.embedding),
        ("vision", spec.vision),
        ("head", spec.head),
    )
    return tuple(part for part, there in held if there)
