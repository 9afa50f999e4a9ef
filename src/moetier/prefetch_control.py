"""Whether prefetching pays: measured all the time, turned down or off by itself, tried again now and then.

Sans-I/O: fed with numbers (seconds between accesses, misses, what prefetches did), it answers with a setting; it reads
no clock, knows no cache, and is a deterministic function of what it is told.

The method: an access's *period* is the time from its begin to the begin of the thread's next one. In windows without
prefetching the controller learns the mean period of accesses with m misses, P(m). In windows with it, an access that
had m misses, found u experts only because they were prefetched, and missed r only because a useless prefetch displaced
them, would have had m + u - r misses, so it

    gained P(m + u - r) - P(m)      paid period - P(m)      net P(m + u - r) - period

What is paid contains everything: the predictor, waiting behind useless reads, late arrivals, slower math beside copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import sqrt
from typing import Any, NamedTuple

__all__ = ["LADDER", "Baseline", "Controller", "Setting", "State", "Step"]


class Setting(NamedTuple):
    """What a prefetch must be: its least probability; and how many may be issued an access, whatever the budget."""

    confidence: float
    limit: int


LADDER = (Setting(0.8, 1), Setting(0.65, 2), Setting(0.5, 4), Setting(0.35, 8))  # strictest first
FIRST = 2  # rung of the first trial
FADE = 0.9  # per window, of what is known of a rung


class State(StrEnum):
    """What the controller is doing."""

    LEARNING = "learning"  # measuring the baseline without
    WARMING = "warming"  # the predictor learns; nothing is prefetched or measured
    TRIAL = "trial"  # on, nothing proven
    ON = "on"
    OFF = "off"


class Step(NamedTuple):
    """One access that is over, as the controller sees it."""

    seconds: float  # its period
    misses: int  # m
    spared: int = 0  # u
    regretted: int = 0  # r
    kind: int = 0  # accesses of one kind are comparable (same phase, similar number of tokens)


@dataclass
class _Mean:
    """Mean and spread of values; each new one lets the old ones fade by `keep`."""

    keep: float = 1.0
    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count = self.count * self.keep + 1
        self.total = self.total * self.keep + value
        self.squares = self.squares * self.keep + value * value

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if self.count < 2:
            return float("inf")
        return sqrt(max(0.0, self.squares / self.count - self.mean**2) / (self.count - 1))


class Baseline:
    """P(m): the mean period of an access with m misses when nothing is prefetched, by kind of access."""

    LEAST = 3  # values, nearly, before a mean counts

    def __init__(self) -> None:
        self._cells: dict[int, dict[int, _Mean]] = {}

    def learn(self, step: Step) -> None:
        """A period without prefetching."""
        cells = self._cells.setdefault(step.kind, {})
        cell = cells.setdefault(step.misses, _Mean(0.98))
        usual = cell.mean if cell.count >= self.LEAST else step.seconds
        cell.add(min(step.seconds, 4 * usual))  # a pause of the machine is nobody's fault

    def seconds(self, kind: int, misses: int) -> float | None:
        """P(m); between and beyond the counts that were seen, along a line. None if too little was seen."""
        cells = self._cells.get(kind, {})
        cell = cells.get(misses)
        if cell is not None and cell.count >= self.LEAST:
            return cell.mean
        known = sorted((abs(m - misses), m) for m, one in cells.items() if one.count >= self.LEAST)
        if len(known) < 2:
            return None
        (_, a), (_, b) = known[:2]
        slope = max(0.0, (cells[b].mean - cells[a].mean) / (b - a))  # a miss never helps
        return max(0.0, cells[a].mean + slope * (misses - a))


@dataclass
class _Rung:
    """What is known of a setting: seconds per access, by window. The machine changes slowly, so that accesses of one
    window are no independent witnesses, but windows between which the baseline is measured anew are."""

    gained: _Mean = field(default_factory=lambda: _Mean(FADE))
    paid: _Mean = field(default_factory=lambda: _Mean(FADE))
    net: _Mean = field(default_factory=lambda: _Mean(FADE))

    @property
    def harms(self) -> bool:
        return self.net.count >= 2.5 and self.net.mean + self.net.error < 0

    @property
    def pays(self) -> bool:
        return self.net.count >= 2.5 and self.net.mean - self.net.error > 0


class Controller:
    """Decides, window by window of `window` accesses, whether to prefetch and how boldly.

    In a *trial* windows with and without prefetching alternate, from the ladder's middle on. A rung that shows a loss
    is left at once, one whose gain does not show within `patience` windows then: for the next stricter one, or for off
    if there is none, or nothing was gained to begin with. A rung that pays is *on*: every `refresh`-th window measures
    without, and half-way between a neighbouring rung is tried, and kept if it is better. While *off* nothing is
    measured and nothing predicted; after `rest` windows there is another trial, then after twice as many, up to 64
    times. `warmup` accesses before the first trial are for a predictor that has to learn.
    """

    def __init__(self, window: int = 64, patience: int = 6, refresh: int = 8, rest: int = 16, warmup: int = 0):
        if min(window, patience, rest) < 1 or refresh < 2 or warmup < 0:
            raise ValueError("a controller's window, patience and rest are at least 1, its refresh at least 2")
        self.window, self.patience, self.refresh = window, patience, refresh
        self.state = State.LEARNING
        self.stage = 0  # goes up whenever state or setting may have changed
        self.baseline = Baseline()
        self.trials = self.changes = self.judged = 0
        self.gained = self.paid = 0.0  # seconds, over all accesses judged
        self._rungs = [_Rung() for _ in LADDER]
        self._rung = self._home = FIRST  # of the present window; the one to come back to
        self._left = window
        self._warmup = warmup
        self._windows = 0  # with prefetching, since the trial began or the rung changed
        self._proven = self._bolder = False
        self._rest, self._first_rest = rest, rest
        self._gained, self._paid = _Mean(), _Mean()  # of the present window
        self._why = "nothing is known yet"

    # -- what to do ---------------------------------------------------------------------------------------------------

    @property
    def setting(self) -> Setting | None:
        """What to prefetch now; None: nothing."""
        return LADDER[self._rung] if self.state in (State.TRIAL, State.ON) else None

    @property
    def measures(self) -> bool:
        """Whether anything is to be done: always but while off."""
        return self.state is not State.OFF

    @property
    def predicts(self) -> bool:
        """Whether the predictor is to be asked: on, or while it learns."""
        return self.state not in (State.OFF, State.LEARNING)

    def words(self) -> str:
        """The decision and its reasons, for people."""
        rung = self._rungs[self._home]
        state = State.OFF if self.state is State.OFF else State.ON if self._proven else State.TRIAL
        if not rung.net.count:
            return f"{state}: {self._why}"
        gained, paid = (f"{1e5 * max(0.0, mean.mean):.1f} ms" for mean in (rung.gained, rung.paid))
        numbers = f"cost {paid}, saved {gained} per 100 accesses at p ≥ {LADDER[self._home].confidence:g}"
        return f"{state}: {numbers}" + (f"; {self._why}" if state is State.OFF else "")

    def report(self) -> dict[str, Any]:
        """The decision in numbers; seconds are sums over the accesses that were judged."""
        setting = self.setting
        return {
            "state": str(self.state),
            "confidence": None if setting is None else setting.confidence,
            "limit": 0 if setting is None else setting.limit,
            "trials": self.trials,
            "changes": self.changes,
            "judged": self.judged,
            "gained_seconds": self.gained,
            "cost_seconds": self.paid,
            "words": self.words(),
        }

    # -- what happened ------------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """There is nothing to gain: off, for as long as after a trial that failed."""
        self._why, self._windows, self._proven = why, 0, False
        self._rungs = [_Rung() for _ in LADDER]
        self._go(State.OFF)
        self._pause()

    def passed(self) -> None:
        """An access begins, measured or not."""
        if self._left <= 0:
            self._turn()
        self._left -= 1

    def record(self, step: Step, ahead: bool) -> None:
        """A period that is over; `ahead`: prefetching was on at its begin, with the present setting."""
        if not 0 <= step.seconds < float("inf"):
            return
        if not ahead:
            if self.state is State.LEARNING and not step.spared:
                self.baseline.learn(step)
            return
        now = self.baseline.seconds(step.kind, step.misses)
        otherwise = self.baseline.seconds(step.kind, max(0, step.misses + step.spared - step.regretted))
        if now is None or otherwise is None or self.setting is None:
            return
        period = min(step.seconds, 4 * max(now, otherwise))  # a pause of the machine is nobody's fault
        self._gained.add(otherwise - now)
        self._paid.add(period - now)
        self.gained += otherwise - now
        self.paid += period - now
        self.judged += 1
        count = self._paid.count
        if count >= 16 and count % 8 == 0 and self._gained.mean + 0.2 * now < self._paid.mean - 3 * self._paid.error:
            self._turn()  # so much worse that the window need not be waited for

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """A window is over, or the present one does great harm."""
        if self.state is State.OFF:
            self._go(State.LEARNING)
            self._rung = self._home = FIRST
            self._rungs = [_Rung() for _ in LADDER]
            self._windows = 0
        elif self.state is State.LEARNING and self._warmup:
            self._go(State.WARMING)
            self._left, self._warmup = self._warmup, 0
        elif self.state is State.WARMING:
            self._go(State.LEARNING)
        elif self.state is State.LEARNING:
            self.trials += not self._proven and not self._windows
            self._go(State.ON if self._proven else State.TRIAL)
        else:
            self._windows += 1
            rung = self._rungs[self._rung]
            if self._paid.count >= self.window / 8:
                rung.gained.add(self._gained.mean)
                rung.paid.add(self._paid.mean)
                rung.net.add(self._gained.mean - self._paid.mean)
            self._judge(rung)
        self._gained, self._paid = _Mean(), _Mean()

    def _judge(self, rung: _Rung) -> None:
        if self._rung != self._home:  # an excursion
            if rung.pays and rung.net.mean > self._rungs[self._home].net.mean:
                self._home = self._rung
            self._rung = self._home
            self._go(State.ON)
        elif rung.harms or (not rung.pays and self._windows >= self.patience):
            self._retreat("it showed a loss" if rung.harms else "no gain showed")
        elif not rung.pays:
            self._go(State.LEARNING)
        else:
            self._windows = 0 if not self._proven else self._windows
            self._proven, self._rest = True, self._first_rest
            if self._windows >= self.refresh:
                self._windows = 0
                self._go(State.LEARNING)
            else:
                if self._windows == self.refresh // 2:
                    self._explore()
                self._go(State.ON)

    def _explore(self) -> None:
        """For one window, a neighbouring rung that is not known to do harm: bolder and stricter by turns."""
        self._bolder = not self._bolder
        rung = self._home + (1 if self._bolder else -1)
        if 0 <= rung < len(LADDER) and not self._rungs[rung].harms:
            self._rung = rung

    def _retreat(self, why: str) -> None:
        """To the next stricter rung that is not known to do harm, or off."""
        self._why, self._windows = why, 0
        gained = self._rungs[self._rung].gained.mean > 0
        stricter = [number for number in range(self._rung) if gained and not self._rungs[number].harms]
        if stricter:
            self._rung = self._home = stricter[-1]
            self._go(State.LEARNING)
        else:
            self._go(State.OFF)
            self._pause()
        self._proven = False

    def _pause(self) -> None:
        self._left = self._rest * self.window
        self._rest = min(2 * self._rest, 64 * self._first_rest)

    def _go(self, state: State) -> None:
        on = (State.TRIAL, State.ON)
        self.changes += (state in on) != (self.state in on)
        self.state, self._left = state, self.window
        self.stage += 1
