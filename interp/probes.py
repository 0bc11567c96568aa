"""Probes of the board: what they are, how they are fitted, and how right they are.

The names that users need, from the files that make them:

- `interp.targets`: what is asked of each square: mine or theirs, black or white, flipped, just played, legal
- `interp.probe_types`: `LinearProbe` and `TwoLayerProbe`, their directions, and every published format
- `interp.probe_training`: `fit_probes` (closed form) and `train_probes` (gradient), all layers in one pass
- `interp.probe_scores`: `probe_accuracy`, with intervals over games
- `interp.probe_table`: probes of all layers beside the baselines to hold them against
"""

from interp.probe_scores import ProbeAccuracy, majority_baseline, probe_accuracy
from interp.probe_table import probe_table
from interp.probe_training import fit_probes, labelled_activations, train_probes
from interp.probe_types import Directions, LinearProbe, Probe, TwoLayerProbe, save_probes
from interp.targets import BLACK, FLIPPED, LEGAL, MINE, PLAYED, TARGETS, Target, shuffled

__all__ = [
    "BLACK",
    "FLIPPED",
    "LEGAL",
    "MINE",
    "PLAYED",
    "TARGETS",
    "Directions",
    "LinearProbe",
    "Probe",
    "ProbeAccuracy",
    "Target",
    "TwoLayerProbe",
    "fit_probes",
    "labelled_activations",
    "majority_baseline",
    "probe_accuracy",
    "probe_table",
    "save_probes",
    "shuffled",
    "train_probes",
]
