"""bf16 weights, with tables cast by the engine or not: every stage runs, and stays near fp32."""

from __future__ import annotations

import pytest
import torch

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.tasks import Preparer
from kmtr.tasks.pretraining import Pretraining


@pytest.mark.parametrize("cast_tables", [True, False])
@pytest.mark.parametrize("stage", ["masked", "align", "embed", "predict"])
def test_bf16_weights(
    small: RunConfig, tables: dict[str, torch.Tensor], batch: Batch, stage: str, cast_tables: bool
) -> None:
    torch.manual_seed(0)
    module = Pretraining(small)
    prepare = Preparer(small, tables, torch.device("cpu"))
    inputs = prepare.queries(batch) if stage in ("embed", "predict") else prepare(batch, stage)
    exact = module(inputs, stage)
    if cast_tables:
        module.bfloat16()
    else:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    rough = module(inputs, stage)
    assert rough.keys() == exact.keys()
    for name, value in exact.items():
        scale = value.detach().abs().mean()
        assert (rough[name].float() - value).detach().abs().mean() < 0.05 * scale, name
    if stage == "masked":
        assert all(loss.dtype == torch.float32 for loss in rough.values())
