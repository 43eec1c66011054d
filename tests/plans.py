"""Plans with every kind of rule, and what they say."""

from dataclasses import replace
from typing import Any

import torch

from teal.foundation.identity import ModelIdentity
from teal.methods import MaskRule
from teal.methods.rule_path import RulePath
from teal.plan import PlannedProjection, SparsityPlan
from tests.helpers import plan_of

IDENTITY = ModelIdentity(
    model_type="llama",
    shapes={"layers.0.q_proj": (4, 8), "layers.0.k_proj": (4, 2), "layers.0.down_proj": (16, 4)},
)
Q, K, DOWN = IDENTITY.shapes


def planned(sparsity: float = 0.5, **rule: Any) -> PlannedProjection:
    mask_rule = MaskRule(**rule) if rule else None
    return PlannedProjection(target_sparsity=sparsity, rule=mask_rule)


def plan_with_vectors() -> SparsityPlan:
    score_scale, shift = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, -0.5, 0.0, -0.0])
    projections = {
        Q: planned(threshold=0.1, score_scale=score_scale, shift=shift.bfloat16()),
        K: planned(threshold=0.25),
        DOWN: planned(0.0),
    }
    return plan_of(IDENTITY, projections)


def plan_with_path() -> SparsityPlan:
    """A plan at 0.5, where `DOWN` has no rule yet; the path gives it a scaled one at 0.8."""
    plan = plan_with_vectors()
    at_target = {name: (p.target_sparsity, p.rule) for name, p in plan.projections.items()}
    down = MaskRule(threshold=0.75, shift=torch.arange(16.0))
    points = {
        0.0: dict.fromkeys(plan.projections, (0.0, None)),
        0.5: at_target,
        0.8: {name: (0.8, rule or down) for name, (_, rule) in at_target.items()},
    }
    return replace(plan, path=RulePath.from_points(points))


def rules_of(plan: SparsityPlan) -> dict[str, Any]:
    """Everything that the rules of a plan say, in a form that can be compared."""
    return {
        name: (planned.target_sparsity, planned.rule.threshold, sorted(planned.rule.vectors))
        for name, planned in plan.projections.items()
        if planned.rule
    }
