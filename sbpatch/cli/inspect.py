"""`sbpatch inspect`: the attention sites of a model."""

from __future__ import annotations

import torch

from ..calibration.costs import CostTable, default_path
from ..calibration.decide import first_decision
from ..data.batch import moved
from ..plan import report
from ..plan.plan import Budget, Plan
from ..sites.find import find_sites
from .flags import CheckpointFile, Device, DeviceFlag, InputSize, JsonFile, Length, Model, Quiet, Seed
from .inputs import open_model
from .results import check_places, out, write_json


def inspect_command(
    model: Model,
    input_size: InputSize = None,
    length: Length = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    check_places(json_file, inputs=(model, checkpoint))
    loaded = open_model(model, checkpoint, input_size, length)
    where = device.resolve()
    probe = moved(loaded.preprocessing.probe(), where, torch.float32)
    costs = CostTable(default_path(), torch.device(where))
    sites = [first_decision(site, limit=costs) for site in find_sites(loaded.model.to(where).eval(), probe)]
    plan = Plan(model=loaded.name, seed=seed, budget=Budget(requested=1.0), sites=sites)
    if not quiet:
        out.print(report.sites_table(plan))
    write_json(json_file, plan.to_json())
