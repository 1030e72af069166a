"""What changes during a run, as a function of the step alone, so that a resumed run goes on to the same numbers.

`plan` says it for one step; nothing here keeps state. A list of a config, "8,16,24", holds for equal parts of the run.
"""

from dataclasses import dataclass

from minigpt.train_config import schedule
from speedrun.config import RaceConfig, numbers


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one step, over all ranks."""

    rows: int  # windows
    context: int  # tokens in each
    window: int  # that a sliding layer sees; 0 for all
    stretched: str  # windows so far, for GPTConfig.rope_windows; empty without yarn
    lr_share: float  # of every peak
    momentum: float  # of Muon
    mtp: tuple[float, ...]  # weights of the losses of the next token, the one after, ...
    untied: bool  # whether a tied head has its own weights by now

    @property
    def kind(self) -> tuple:
        """Steps of one kind are one compiled program."""
        return self.rows, self.context, self.window, self.stretched, len(self.mtp), self.untied


def plan(step: int, config: RaceConfig) -> Plan:
    """For step 0 to config.steps - 1."""
    batch, context = part(config.batches, step, config) or config.batch, part(config.contexts, step, config)
    context = context or config.context
    share = step / config.steps
    return Plan(
        rows=batch * config.context // context,
        context=context,
        window=part(config.windows, step, config) or config.window,
        stretched=",".join(map(str, windows_until(step, config))) if config.yarn else "",
        lr_share=schedule(step, config) * (batch / (whole(config.batches) or [batch])[0]) ** config.batch_lr,
        momentum=momentum(step, config),
        mtp=mtp_weights(share, config),
        untied=bool(config.untie_at) and share >= config.untie_at,
    )


def whole(text: str) -> list[int]:
    return [int(value) for value in numbers(text)]


def part(text: str, step: int, config: RaceConfig) -> int:
    """The entry of a list that holds at a step; 0 of an empty one."""
    values = whole(text)
    return values[step * len(values) // config.steps] if values else 0


def windows_until(step: int, config: RaceConfig) -> list[int]:
    values = whole(config.windows)
    return values[: step * len(values) // config.steps + 1]


def momentum(step: int, config: RaceConfig) -> float:
    """Rises in a straight line over the first steps: an early average would be one of gradients long out of date."""
    if not config.momentum_start:
        return config.momentum
    share = min(step / config.momentum_warmup, 1.0)
    return config.momentum_start + share * (config.momentum - config.momentum_start)


def mtp_weights(share: float, config: RaceConfig) -> tuple[float, ...]:
    """The first stays 1; each later one falls in a straight line, to 0 at config.mtp_until, and those at 0 are gone."""
    weights = numbers(config.mtp) or [1.0]
    left = max(0.0, 1 - share / config.mtp_until) if config.mtp_until else 0.0
    later = [weight * left for weight in weights[1:]]
    while later and later[-1] == 0:
        later.pop()
    return (1.0, *later)
