"""Do an engine's maps look like FP32's, and is it as sure of what they show?

A search may ask this on images that tune; the report card is for those that judge.
"""

from __future__ import annotations

import numpy as np

from appliance.compiler import xai
from appliance.compiler.subject import Array, Explainer, MapSpec
from models.evaluate import Runner

MOST = 24  # inputs looked at


class Lookalike:
    """Whether an engine's maps are like FP32's, on inputs that may be looked at while tuning: the card's rows of agreement; and whether
    it is as sure of their targets on average, which the card's insertion and deletion are about."""

    def __init__(self, explainer: Explainer, fp32: Runner, spec: MapSpec, input_name: str, most: int = MOST) -> None:
        self._explainer, self._input, self._dense = explainer, input_name, spec.kind == "class-evidence"
        self._limits = xai.LIMITS.get(spec.kind, xai.Limits())
        self._wanted: list[tuple[Array, int, Array]] = []
        self._sure: list[float] = []
        for sample in explainer.samples()[:most]:
            outputs = fp32({input_name: sample.x})
            target = explainer.target(outputs)
            raw = explainer.map(outputs, target)
            if xai.defined(raw):
                self._wanted.append((sample.x, target, raw))
                self._sure.append(explainer.score(outputs, target))

    def __call__(self, engine: Runner) -> bool:
        found, sure = [], []
        for x, target, raw in self._wanted:
            outputs = engine({self._input: x})
            sure.append(self._explainer.score(outputs, target))
            found.append(xai.agreement(raw, self._explainer.map(outputs, target), xai.plane_hw(x), dense=self._dense))
        if found and abs(float(np.mean(self._sure)) - float(np.mean(sure))) > self._limits.insertion_fall:
            return False
        return all(row.passed is not False for row in xai.agreement_rows(found, self._limits))
