"""Fisher information of the source model: measured once, at its own weights."""

from forgetscale.methods.fisher.measure import measure_basis, settings_of
from forgetscale.methods.fisher.targets import match_targets

__all__ = ["match_targets", "measure_basis", "settings_of"]
