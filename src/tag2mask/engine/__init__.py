"""Trains any module whose forward(batch, progress) returns a dict of losses."""

from tag2mask.engine.checkpoint import read_log
from tag2mask.engine.devices import Device, Devices
from tag2mask.engine.fit import fit
from tag2mask.engine.training import Training

__all__ = ["Device", "Devices", "Training", "fit", "read_log"]
