"""bf16 weights, with tables cast by the engine or not: every stage runs, and stays near fp32."""

from __future__ import annotations

import pytest
import torch
from inside import prepared

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.tasks import Model, Preparer


@pytest.mark.parametrize("cast_tables", [True, False])
@pytest.mark.parametrize("what", ["masked", "align", "embedding", "queries"])
def test_bf16_weights(
    small: RunConfig, tables: dict[str, torch.Tensor], batch: Batch, what: str, cast_tables: bool
) -> None:
    torch.manual_seed(0)
    module = Model(small)
    prepare = Preparer(small, tables, torch.device("cpu"))
    if what == "queries":
        inputs = prepare.queries(batch, batch.sampled)
    else:
        inputs = prepare.embedding(batch) if what == "embedding" else prepared(prepare, batch, what)
    exact = module(inputs, predict=what == "queries")
    if cast_tables:
        module.bfloat16()
    else:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    rough = module(inputs, predict=what == "queries")
    assert rough.keys() == exact.keys()
    for task, outputs in exact.items():
        for name, value in outputs.items():
            if value.dtype == torch.bool:
                assert torch.equal(rough[task][name], value)
                continue
            scale = value.detach().abs().mean()
            assert (rough[task][name].float() - value).detach().abs().mean() < 0.05 * scale, name
            assert name != "loss" or rough[task][name].dtype == torch.float32
