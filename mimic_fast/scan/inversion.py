"""Trigger inversion: the smallest change that sends the features of all images to one place.

After DECREE (Feng et al., CVPR 2023, arXiv:2303.15180), which minimizes ``-similarity + lambda
|mask|_1`` with a lambda that follows the similarity. Here the size itself is the quantity that
follows: a little smaller whenever the images have collapsed, a little larger while they have not,
and the trigger of that size collapses them as well as it can. Nothing has to be tuned to the scale
of an encoder's features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.errors import UnsafeInputError
from mimic_fast.scan.concentration import concentration
from mimic_fast.scan.forms import Form
from mimic_fast.watch import leave_if

_SHRINK, _GROW = 0.97, 1.01  # of the size, each step
_MEMORY = 0.8  # of the moving average that decides between the two: about five batches
_LEARNING_RATE = 0.1  # of logits, and of noise of unit deviation
_BETAS = (0.5, 0.9)  # the goal moves with the size, so that the past counts less


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted:
    """The smallest trigger found for one level.

    Args:
        size: In the form's own scale (not its unit); the largest size if the level was not reached.
        reached: Whether the level was reached at all.
        mask: Opacity.
        pattern: What is pasted or added.
    """

    size: float
    reached: bool
    mask: Float[Tensor, "1 height width"]
    pattern: Float[Tensor, "channel height width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and towards what.

    Args:
        levels: Concentrations to reach, from the highest down.
        steps: Steps for each.
        batch_size: Images in a step.
        seed: Draws the batches.
    """

    levels: Sequence[float]
    steps: int
    batch_size: int
    seed: int


class Search:
    """A search that can be left after any step and taken up again; its state is tensors.

    ``step`` counts the steps done; ``size`` is the trigger's at the next one.

    Args:
        form: What kind of trigger.
        parameters: Where it starts.
        schedule: Levels and steps.
        device: Where it computes.
    """

    def __init__(
        self, form: Form, parameters: Sequence[Tensor], schedule: Schedule, device: torch.device
    ) -> None:
        self._form, self._schedule = form, schedule
        self._free = [tensor.clone().to(device).requires_grad_() for tensor in parameters]
        self._optimizer = torch.optim.Adam(self._free, _LEARNING_RATE, betas=_BETAS)
        self.size, self._average = form.first, 0.0
        with torch.no_grad():
            mask, pattern = form.build(self._free, form.largest)
        nothing = Inverted(size=form.largest, reached=False, mask=mask, pattern=pattern)
        self._best = [nothing for _ in schedule.levels]
        self.step = 0

    @property
    def total(self) -> int:
        """Steps in all."""
        return self._schedule.steps * len(self._schedule.levels)

    def advance(
        self,
        encoder: nn.Module,
        images: Float[Tensor, "image channel height width"],
        center: Float[Tensor, " feature"],
    ) -> float:
        """One step; returns the concentration of its batch.

        Raises:
            UnsafeInputError: If the encoder gives features that are not finite.
        """
        level = self._schedule.levels[self.step // self._schedule.steps]
        generator = torch.Generator().manual_seed(self._schedule.seed * 1_000_003 + self.step)
        ids = torch.randint(len(images), (self._schedule.batch_size,), generator=generator)
        mask, pattern = self._form.build(self._free, self.size)
        triggered = self._form.stamp(images[ids.to(images.device)], mask, pattern)
        collapsed = concentration(encoder(triggered).float(), center)
        self._optimizer.zero_grad(set_to_none=True)
        (-collapsed).backward()
        value = float(collapsed.detach())
        if value != value:
            raise UnsafeInputError("the encoder gives features that are not finite; cannot scan it")
        self._optimizer.step()
        self._average = _MEMORY * self._average + (1 - _MEMORY) * value
        self._keep(mask.detach(), pattern.detach())
        factor = _SHRINK if self._average >= level else _GROW
        self.size = min(self._form.largest, self.size * factor)
        self.step += 1
        return value

    def results(self) -> tuple[Inverted, ...]:
        """The smallest trigger so far of each level, in the levels' order."""
        return tuple(self._best)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        numbers = [float(self.step), self.size, self._average]
        tensors = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for index, free in enumerate(self._free):
            tensors[f"free.{index}"] = free.detach()
            for name, value in self._optimizer.state[free].items():
                tensors[f"adam.{index}.{name}"] = value
        for index, best in enumerate(self._best):
            found = [best.size, float(best.reached)]
            tensors[f"best.{index}"] = torch.tensor(found, dtype=torch.float64)
            tensors[f"mask.{index}"], tensors[f"pattern.{index}"] = best.mask, best.pattern
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from :meth:`state`."""
        step, self.size, self._average = state["numbers"].tolist()
        self.step = int(step)
        for index, free in enumerate(self._free):
            with torch.no_grad():
                free.copy_(state[f"free.{index}"])
            moments = {
                name.rsplit(".", 1)[1]: tensor.clone().to("cpu" if "step" in name else free.device)
                for name, tensor in state.items()
                if name.startswith(f"adam.{index}.")
            }
            if moments:
                self._optimizer.state[free] = moments
        for index in range(len(self._best)):
            size, reached = state[f"best.{index}"].tolist()
            self._best[index] = Inverted(
                size=size,
                reached=bool(reached),
                mask=state[f"mask.{index}"].to(self._free[0].device),
                pattern=state[f"pattern.{index}"].to(self._free[0].device),
            )

    def _keep(self, mask: Tensor, pattern: Tensor) -> None:
        """Notes the trigger for every level that the recent batches reached with it."""
        for index, level in enumerate(self._schedule.levels):
            if self._average >= level and self.size < self._best[index].size:
                self._best[index] = Inverted(
                    size=self.size, reached=True, mask=mask, pattern=pattern
                )


def invert(
    search: Search,
    encoder: nn.Module,
    images: Float[Tensor, "image channel height width"],
    center: Float[Tensor, " feature"],
    *,
    every: int,
    save: Callable[[dict[str, Tensor]], None],
    tick: Callable[[int, float], None],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Inverted, ...]:
    """Runs a search to its end from wherever it stands.

    Args:
        search: New, or restored.
        encoder: In eval mode, its weights without gradients.
        images: Pixel values in [0, 1], on the encoder's device.
        center: Mean feature of clean images, on that device.
        every: Steps between two calls of ``save``.
        save: Gets the search's state, also at the end and before leaving.
        tick: Told the step's number and its concentration.
        stop: Polled every step; true saves and leaves.

    Raises:
        StoppedError: If ``stop`` told so.
        UnsafeInputError: As in :meth:`Search.advance`.
    """
    while search.step < search.total:
        if stop():
            save(search.state())
            leave_if(stop)
        value = search.advance(encoder, images, center)
        if search.step % every == 0:
            save(search.state())
        tick(search.step, value)
    save(search.state())
    return search.results()
