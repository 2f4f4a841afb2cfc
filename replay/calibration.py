"""The drift of an engine against itself, as measured, and the test that a replay's drift has to pass.

What was measured under the conditions with most drift is kept as samples of |drift| by how likely the token was, since
logprobs of unlikely tokens move more.
Under the null hypothesis, that today's engine is the calibrated one, each token's drift has the conformal p-value
(1 + samples at least as large) / (1 + samples) of its class (Mondrian conformal prediction, Vovk et al.). A sequence's
tokens are joined by Fisher's method: the sum of -ln p is at most Gamma(n, 1). Tokens of one sequence are not independent, and
some sequences drift more as a whole, so n is divided by the dispersion that whole sequences showed while calibrating
(Brown's method), which grows with n. A second test looks for one token that no noise explains, and a third, of seeded
choices (`replay.sampling`), has the other half of the stated chance of a false alarm.

Calibrations are files in `DATA/calibrations`, written by rename and named by the digests that they hold for.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from replay.chances import binomial_limit, gamma_tail, upper_share
from schemas.environment import compare
from schemas.errors import CorruptStore
from schemas.events import EnvironmentCaptured
from schemas.probe import DRIFT_NATS, item

Drifts = npt.NDArray[np.float64]

CLASSES = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Surprisal in nats that separates the classes of tokens: near certain, likely … hardly ever said."""
CLASS_SAMPLES_MIN = 200
"""A class with fewer samples takes those of its neighbours too."""
CLASS_SAMPLES_MAX = 2000
"""Kept of each class, at random: a p-value below 1/2000 tells no more than that."""
FAR = 8.0
"""Times the measured 99.9th percentile beyond which one token tells: below 1e-20 where tails are exponential."""
ROUNDING_NATS = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""About one unit in the last place of a logit: what one token may be off where calibrating saw no drift at all."""
EQUAL_NATS = 2e-6
"""Two units in the last place of a 32-bit logprob: what printing and parsing may change."""
LONGER = 2
"""Times the length of the sequences measured that another one may have."""
TELLING = 0.01
"""The first token with a p-value of this or less is the one that tells."""
UNSEEN = math.log(5)
"""Evidence per token of a sequence that drifts all along as the highest fifth of what was measured does."""
SPREAD_ERRORS = 2.0
"""Standard errors added to the variance that whole sequences showed."""
FALSE_ALARM = 1e-3
"""Chance of a false *model differs* or *sampling differs*, per sequence and per session."""


class Condition(BaseModel):
    """One way of running the engine against itself, and what it showed."""

    model_config = ConfigDict(frozen=True)
    name: str
    sequences: int
    tokens: int
    p50: float
    p99: float
    max: float


class Calibration(BaseModel):
    """What an engine's own noise is. `samples` are sorted |drift| in nats, one list per class of surprisal."""

    model_config = ConfigDict(frozen=True)
    environment: EnvironmentCaptured
    engine: str
    made_at: dt.datetime
    conditions: list[Condition]
    samples: list[list[float]]
    far_nats: float
    """The drift beyond which one token tells."""
    spread: float
    """By how much sequences differ as a whole: variance of a sequence's mean evidence per token, over that of one token."""
    tokens_median: int
    """Tokens of the sequences in which that was seen."""
    noise: str | None = None
    """The noise function that made the engine's seeded tokens again, None where none did."""
    noise_tolerance: float = 0.0
    noise_misses: int = 0
    noise_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens whose drift was measured."""
        return sum(condition.tokens for condition in self.conditions)

    @property
    def p99(self) -> float:
        """The largest 99th percentile of a condition, in nats."""
        return max((condition.p99 for condition in self.conditions), default=0.0)

    def dispersion(self, tokens: int) -> float:
        """Variance of the sum over a sequence of so many tokens, over that of independent ones; at least 1."""
        return 1 + self.spread * max(tokens, self.tokens_median)

    @cached_property
    def _classes(self) -> list[Drifts]:
        return [np.array(values, np.float64) for values in self.samples]

    def reaches(self, tokens: int) -> bool:
        """Whether sequences of so many tokens are like those that were measured: longer ones take other ways through the kernels."""
        return tokens <= LONGER * self.tokens_median

    def fits(self, environment: EnvironmentCaptured) -> bool:
        """Whether it holds for an environment: same origin, semantic and numeric items; probes that flutter within noise."""
        if self.environment.origin != environment.origin:
            return False
        if any(d.digest != "scheduling" and d.key not in _FLUTTERING for d in compare(self.environment, environment)):
            return False
        return item(environment, "weights.sha256") is not None or _near(self.environment, environment)

    def p_values(self, logprobs: Drifts, drift: Drifts) -> Drifts:
        """The chance, per token, of a drift at least as large; 1 where nothing moved."""
        which = np.searchsorted(CLASSES, -logprobs)
        found = np.ones(len(drift))
        for number, samples in enumerate(self._classes):
            mine = (which == number) & (drift > EQUAL_NATS)
            larger = len(samples) - np.searchsorted(samples, drift[mine], "left")
            found[mine] = (1 + larger) / (1 + len(samples))
        return found

    def test(self, logprobs: Drifts, drift: Drifts, *, false_alarm: float = FALSE_ALARM) -> Tested:
        """Whether the calibrated engine's noise explains these drifts; `false_alarm` is the chance of a no where it does."""
        p = self.p_values(logprobs, drift)
        evidence = float(-np.log(p).sum())
        dispersion = self.dispersion(len(p))
        chance = gamma_tail(len(p) / dispersion, evidence / dispersion)
        telling = int(np.argmax(p <= max(TELLING, p.min())))
        if float(drift.max()) > self.far_nats:
            reason = f"token {int(np.argmax(drift > self.far_nats))} is off by more than {self.far_nats:.2g} nats, which no noise explains"
            return Tested(reason, int(np.argmax(drift > self.far_nats)), 0.0)
        if chance <= false_alarm / 2:
            return Tested(f"the engine's own noise explains such drift with a chance of {_power(chance)}", telling, chance)
        return Tested(None, None, chance)

    def limit_of_misses(self, tokens: int, false_alarm: float) -> int:
        """The most of `tokens` seeded choices that the calibrated engine fails to make again, but for `false_alarm`."""
        share = upper_share(self.noise_misses, self.noise_tokens)
        return binomial_limit(tokens, share, false_alarm)


class Tested(NamedTuple):
    """`reason` is None where noise explains the drift; `telling` is the first token, counted among those tested."""

    reason: str | None
    telling: int | None
    chance: float


_FLUTTERING = frozenset({"probe.logprobs", "probe.choices", "system_fingerprint"})


def _near(before: EnvironmentCaptured, after: EnvironmentCaptured) -> bool:
    """Whether two probes of a model whose weights are not told differ by no more than noise."""
    old, new = item(before, "probe.logprobs"), item(after, "probe.logprobs")
    if not old or not new or len(old) != len(new):
        return False
    return all(abs(a - b) <= DRIFT_NATS for a, b in zip(old, new, strict=True))


class Measured(NamedTuple):
    """One sequence of a condition: its recorded logprobs and the drift of each token."""

    condition: str
    logprobs: Drifts
    drift: Drifts


def calibrated(
    environment: EnvironmentCaptured, engine: str, measured: Sequence[Measured], *, dtype: str, made_at: dt.datetime
) -> Calibration:
    """The calibration of these measurements, without a noise function."""
    rng = np.random.default_rng(0)
    noisy = _noisiest(measured)
    logprobs, drift = (np.concatenate([getattr(m, name) for m in noisy]) for name in ("logprobs", "drift"))
    samples = [_sample(drift, np.searchsorted(CLASSES, -logprobs), number, rng) for number in range(len(CLASSES) + 1)]
    far = max(FAR * float(np.quantile(drift, 0.999)), FAR * ROUNDING_NATS.get(dtype, ROUNDING_NATS["bfloat16"]))
    first = Calibration(
        environment=environment,
        engine=engine,
        made_at=made_at,
        conditions=[
            _condition(name, [m for m in measured if m.condition == name]) for name in dict.fromkeys(m.condition for m in measured)
        ],
        samples=samples,
        far_nats=far,
        spread=0.0,
        tokens_median=int(np.median([len(m.drift) for m in measured])),
    )
    return first.model_copy(update={"spread": _spread(first, noisy)})


def _noisiest(measured: Sequence[Measured]) -> list[Measured]:
    """What was measured under the conditions with most drift: nobody knows under which of them a replay will be.

    A quiet condition, such as batches that all go through the same kernels, would make the drift of another look unheard of.
    """
    means = {
        name: float(np.concatenate([m.drift for m in measured if m.condition == name]).mean()) for name in {m.condition for m in measured}
    }
    return [m for m in measured if means[m.condition] >= max(means.values()) / 2]


def _condition(name: str, those: Sequence[Measured]) -> Condition:
    drift = np.concatenate([m.drift for m in those])
    p50, p99 = (float(value) for value in np.quantile(drift, (0.5, 0.99)))
    return Condition(name=name, sequences=len(those), tokens=len(drift), p50=p50, p99=p99, max=float(drift.max()))


def _sample(drift: Drifts, which: npt.NDArray[np.intp], number: int, rng: np.random.Generator) -> list[float]:
    """The drifts of a class, with those of neighbours where it has few, thinned at random where it has many."""
    reach = 0
    while (mine := np.abs(which - number) <= reach).sum() < min(CLASS_SAMPLES_MIN, len(drift)):
        reach += 1
    values = drift[mine]
    kept = rng.choice(values, CLASS_SAMPLES_MAX, replace=False) if len(values) > CLASS_SAMPLES_MAX else values
    return [float(f"{value:.6g}") for value in np.sort(kept)]


def _spread(calibration: Calibration, measured: Sequence[Measured]) -> float:
    """The variance that sequences have as a whole, from the excess of their sums over n: of independent tokens it is n.

    Only sums above n count, and twice: what lies below raises no alarm. So few sequences tell a variance by a margin only,
    which is added: two standard errors. And as a p-value counts one sample more than there were, one sequence more is
    counted, which drifts all along: where one in ten does, a dozen may show none.
    """
    lengths = np.array([len(each.drift) for each in measured], np.float64)
    sums = np.array([-np.log(calibration.p_values(each.logprobs, each.drift)).sum() for each in measured])
    excess = 2 * np.maximum(np.append(sums - lengths, (UNSEEN - 1) * lengths.mean()), 0.0) ** 2
    margin = 1 + SPREAD_ERRORS * math.sqrt(2 / len(measured))
    return max(0.0, float((excess.mean() * margin - lengths.mean()) / (lengths**2).mean()))


class Calibrations:
    """The calibrations of an installation, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, calibration: Calibration) -> Path:
        """Keep a calibration; it takes the place of an earlier one of the same environment."""
        environment = calibration.environment
        digests = [(digest or b"").hex()[:16] or "untold" for digest in (environment.semantic, environment.numeric)]
        path = self._folder / f"{'-'.join(digests)}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(calibration.model_dump_json(), encoding="utf-8")
        os.replace(beside, path)
        return path

    def all(self) -> list[Calibration]:
        """Every calibration, the newest first.

        Raises:
            CorruptStore: a file is none.
        """
        found = [self._read(path) for path in self._folder.glob("*.json")]
        return sorted(found, key=lambda calibration: calibration.made_at, reverse=True)

    def of(self, environment: EnvironmentCaptured) -> Calibration | None:
        """The newest that holds for an environment."""
        return next((calibration for calibration in self.all() if calibration.fits(environment)), None)

    def _read(self, path: Path) -> Calibration:
        try:
            return Calibration.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise CorruptStore(
                "this is no calibration", operation="read calibration", place=str(path), hint="delete it and run: tokentape calibrate"
            ) from error


def _power(chance: float) -> str:
    return f"{chance:.0e}" if chance > 1e-12 else "below 1e-12"
