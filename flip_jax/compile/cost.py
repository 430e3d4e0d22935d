"""How long a step would take, by peak numbers and stated assumptions: an estimate, no more."""

from __future__ import annotations

from dataclasses import dataclass

from flip_jax.compile.collectives import SLICES
from flip_jax.compile.step import CompiledStep

# Share of the peak FLOP/s that matrix products are taken to reach. Assumed, not measured.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Bounds:
    """`best`: everything overlaps. `worst`: nothing does."""

    best: float
    worst: float

    def times(self, factor: float) -> Bounds:
        return Bounds(self.best * factor, self.worst * factor)


@dataclass(frozen=True)
class Estimate:
    """Seconds per step by what they are spent on, and what follows from their maximum and sum.

    Attributes:
      compute: matrix products at `efficiency` of the peak.
      hbm: what all kernels read and write; where they are not known operands and results of matrix
        products, and the state read and written once.
      kernels: one after the other, each the longer of its products and its bytes; None = not known.
      ici: collectives inside a slice at the full bandwidth of a chip's links.
      dcn: collectives between slices; None = bandwidth not published.
      step: the largest of these, and the sum of the four.
      hours: of all steps, without evaluation, saving and compiling.
      price: None without a price per chip-hour.
    """

    efficiency: float
    compute: float
    hbm: float
    kernels: float | None
    ici: float
    dcn: float | None
    step: Bounds
    mfu: Bounds
    pairs_per_second: Bounds
    hours: Bounds
    chip_hours: Bounds
    price: Bounds | None


def estimate(
    step: CompiledStep,
    batch_size: int,
    steps: int,
    efficiency: float = EFFICIENCY,
    price_per_chip_hour: float | None = None,
) -> Estimate | None:
    """The estimate for a run of `steps`; None if it does not fit or something is not known."""
    chip, needed = step.chip, (step.chip, step.peak, step.dot_flops, step.collectives)
    if None in needed or not step.memory.fits:
        return None
    speed, bandwidth = step.peak * efficiency, chip.hbm_bandwidth
    compute, kernels = step.dot_flops / speed, None
    hbm = (step.dot_bytes + 2 * step.memory.arguments) / bandwidth
    if step.kernels is not None:
        hbm = sum(kernel.bytes for kernel in step.kernels) / bandwidth
        kernels = sum(kernel.seconds(speed, bandwidth) for kernel in step.kernels)
    between = sum(c.sent_bytes for c in step.collectives if c.axes == SLICES)
    ici = (sum(c.sent_bytes for c in step.collectives) - between) / chip.ici_bandwidth
    dcn = 0.0 if not between else between / chip.dcn_bandwidth if chip.dcn_bandwidth else None
    spent = [compute, hbm, ici, dcn or 0.0]
    # Kernels may compute more than is asked for, where shapes are filled up.
    best = max(*spent, kernels or 0.0)
    seconds = Bounds(best, max(best, sum(spent)))
    hours = seconds.times(steps / 3600)
    chip_hours = hours.times(step.chips)
    return Estimate(
        efficiency=efficiency,
        compute=compute,
        hbm=hbm,
        kernels=kernels,
        ici=ici,
        dcn=dcn,
        step=seconds,
        mfu=_inverse(step.model_flops / step.peak, seconds),
        pairs_per_second=_inverse(batch_size, seconds),
        hours=hours,
        chip_hours=chip_hours,
        price=price_per_chip_hour and chip_hours.times(price_per_chip_hour),
    )


def _inverse(amount: float, seconds: Bounds) -> Bounds:
    return Bounds(amount / seconds.best, amount / seconds.worst)
