"""Source-Shielded Updates (SSU), arXiv:2512.04844.

A few hundred blocks of source chat run through the source model. Every input column of every
matrix of the decoder body gets one score, the norm of its weights times the norm of its inputs;
the half with the highest scores never moves during training. Embeddings and head are trained.

Use it when a model must learn a language or domain from raw text and keep its chat behaviour.
``frozen_fraction`` 0.5 is the published setting. ``score: paper`` is the formula of the paper,
``official`` that of its code (they differ, see ``forgetscale.ops.importance``); ``mag_l1``,
``mag_l2`` and ``rand`` are controls. ``score: forgetscale`` is ours: columns by their Fisher
information on the source data per element, ranked over all matrices together. ``axis: row`` and
``axis: element`` freeze output features or single weights instead, each scored both as the paper's
formula says and as its code does. Costs one forward pass over the calibration blocks (and one
backward for Fisher scores) and, in the masked layout, one multiply per gradient element and step.
"""

from forgetscale.methods.ssu.method import Ssu

__all__ = ["Ssu"]
