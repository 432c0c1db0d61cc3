"""The groups of a point fit's parameters."""

import json
from typing import Any

from ebm_ppl.export.contents import Contents, parameters_of
from ebm_ppl.export.groups import Group
from ebm_ppl.model.program import require_same_parameters
from ebm_ppl.normalizer.score_test import ScoreTest


def parameter_groups(
    held: Contents, score_test: ScoreTest | None
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Values, and what a score test says of them: groups and attributes."""
    groups = {"parameters": Group(held.parameters)}
    if score_test is None:
        return groups, {}
    require_same_parameters(
        "score_test",
        score_test.params,
        held.params,
        "Test these: ebm_ppl.score_test(rng_key, fit, model, ...).",
    )

    # Of nets there are distances along directions alone, which are no parameters'.
    if score_test.standard_errors:
        for name, values in (
            ("standard_errors", score_test.standard_errors),
            ("distances", score_test.distance),
        ):
            groups[name] = Group(parameters_of(values, held.naming))

    return groups, {
        "is_at_maximum": int(score_test.is_at_maximum),
        "gain_per_row": float(score_test.gain_per_row),
        "score_test_flags": json.dumps(score_test.flags, ensure_ascii=False),
    }
