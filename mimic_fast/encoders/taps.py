"""Taps: the feature maps of chosen layers, read by forward hooks while the encoder runs.

Hooks live only during a forward pass, so copying, wrapping and saving a tapped encoder need no
care. ViT tokens become maps by dropping class and register tokens and restoring the grid.
``method.md`` sections 2 and 3.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import UsageError

FeatureMap = Float[Tensor, "batch _ _ _"]

# Module lists that hold a network's stages or blocks, by library.
_CONTAINERS = ("blocks", "stages", "layers", "encoder.layers", "features", "trunk_output")


@runtime_checkable
class Listener(Protocol):
    """Takes each tap's activation while the encoder runs; it goes on with what is returned."""

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        """A map ``[B, C, H, W]``, tokens ``[B, N, C]`` or features ``[B, D]``."""
        ...


class TappedEncoder(nn.Module):
    """An encoder that also returns the feature maps of its taps.

    Args:
        encoder: What runs; its keys keep the prefix ``encoder.``.
        taps: Module paths relative to ``encoder.backbone``, shallow to deep.

    Raises:
        UsageError: If a tap does not exist, is given twice or none is given.
    """

    def __init__(self, encoder: Encoder, taps: tuple[str, ...]) -> None:
        super().__init__()
        modules = dict(encoder.backbone.named_modules())
        for tap in taps:
            if tap not in modules or not tap:
                raise UsageError(
                    f"tap layer {tap!r} is not in {encoder.spec.architecture}; "
                    f"have: {_summary(list(modules)[1:])}"
                )
        if not taps or len(set(taps)) != len(taps):
            raise UsageError(f"encoder.taps must name different layers, at least one; got {taps}")
        self.encoder = encoder
        self.taps = tuple(taps)
        self.training = encoder.training

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch feature"], tuple[FeatureMap, ...]]:
        """Features and one live feature map per tap, in the order of ``taps``.

        Raises:
            UsageError: If a tap's output is not a feature map or a grid of tokens.
        """
        features, outputs = self._run(images)
        return features, tuple(map(self._feature_map, self.taps, outputs))

    def listened(
        self, images: Float[Tensor, "batch channel height width"], listener: Listener
    ) -> Float[Tensor, "batch feature"]:
        """Features, with every tap's activation handed to ``listener`` as it lies in memory.

        Raises:
            UsageError: As in ``forward``.
        """
        features, _ = self._run(images, listener)
        return features

    def pooled(
        self,
        images: Float[Tensor, "batch channel height width"],
        *,
        pool: Literal["mean", "class_token"],
    ) -> tuple[Float[Tensor, "batch feature"], tuple[Float[Tensor, "batch _"], ...]]:
        """Features and one vector per tap.

        Args:
            images: Un-normalized, in [0, 1].
            pool: ``mean`` over the positions of the map; ``class_token`` takes that token where the
                tap returns tokens. Taps of CNNs are always averaged.

        Raises:
            UsageError: As in ``forward``, or if there is no class token.
        """
        features, outputs = self._run(images)
        vectors: list[Tensor] = []
        for tap, output in zip(self.taps, outputs, strict=True):
            if pool == "class_token" and output.ndim == 3:
                if not has_class_token(self.encoder):
                    raise UsageError(
                        f"{self.encoder.spec.architecture} has no class token; set mi.pool = 'mean'"
                    )
                vectors.append(output[:, 0])
            else:
                vectors.append(self._feature_map(tap, output).mean((2, 3)))
        return features, tuple(vectors)

    def _run(self, images: Tensor, listener: Listener | None = None) -> tuple[Tensor, list[Tensor]]:
        caught: dict[str, list[Any]] = {tap: [] for tap in self.taps}

        def catcher(index: int, tap: str) -> Callable[[Any], Tensor | None]:
            def catch(output: Any) -> Tensor | None:
                caught[tap].append(output)
                if listener is None or not isinstance(output, Tensor) or len(caught[tap]) > 1:
                    return None
                return self._heard(listener, index, tap, output)

            return catch

        with ExitStack() as hooks:
            for index, tap in enumerate(self.taps):
                module = self.encoder.backbone.get_submodule(tap)
                hooks.enter_context(_hooked(module, catcher(index, tap)))
            features = self.encoder(images)
        for tap, outputs in caught.items():
            if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
                what = f"ran {len(outputs)} times" if len(outputs) != 1 else "returns no tensor"
                raise UsageError(
                    f"tap layer {tap!r} {what} in a forward; it must run once and return a tensor"
                )
        return features, [outputs[0] for outputs in caught.values()]

    def _heard(self, listener: Listener, index: int, tap: str, output: Tensor) -> Tensor:
        feature_map = self._feature_map(tap, output)
        if output.ndim == 3:
            return listener.tap(index, output, prefix=_prefix_tokens(self.encoder.backbone))
        if output.ndim == 2:
            return listener.tap(index, output)
        heard = listener.tap(index, feature_map)
        # A view in another order of axes, as _feature_map makes of NHWC, goes back as it came.
        return heard if feature_map is output else heard.permute(0, 2, 3, 1)

    def _feature_map(self, tap: str, output: Tensor) -> Tensor:
        backbone = self.encoder.backbone
        if output.ndim == 2:
            return output[:, :, None, None]
        if output.ndim == 3:
            tokens = output[:, _prefix_tokens(backbone) :]
            side = math.isqrt(tokens.shape[1])
            if side and side * side == tokens.shape[1]:
                return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if output.ndim == 4:
            # Images are square, so the equal pair of axes is the spatial one.
            channels_last = str(getattr(backbone, "output_fmt", "")).endswith("NHWC")
            if output.shape[1] == output.shape[2] and (
                channels_last or output.shape[2] != output.shape[3]
            ):
                return output.permute(0, 3, 1, 2)
            if output.shape[2] == output.shape[3]:
                return output
        raise UsageError(
            f"tap layer {tap!r} returns {list(output.shape)}, neither a square feature map "
            "nor a square grid of tokens; choose another layer"
        )


def default_taps(encoder: Encoder) -> tuple[str, ...]:
    """The stages of a CNN or the blocks of a ViT, shallow to deep.

    Raises:
        UsageError: If the architecture has neither under a known name.
    """
    backbone = encoder.backbone
    for stem in ("layer", "s", "stage", "block"):
        names = tuple(f"{stem}{n}" for n in range(1, 9) if _submodule(backbone, f"{stem}{n}"))
        if len(names) > 1:
            return names
    for path in _CONTAINERS:
        container = _submodule(backbone, path)
        if container is None:
            continue
        # A child without children is one convolution or activation, not a stage.
        stages = [name for name, child in container.named_children() if any(child.children())]
        if len(stages) > 1:
            return tuple(f"{path}.{name}" for name in stages)
    raise UsageError(
        f"{encoder.spec.architecture} has no layers known as stages or blocks; give encoder.taps, "
        f"of: {_summary([name for name, _ in backbone.named_modules() if name])}"
    )


def has_class_token(encoder: Encoder) -> bool:
    """Whether the encoder is a ViT with a class token."""
    return _class_token(encoder.backbone)


def tap_shapes(tapped: TappedEncoder) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of every tap's map at the encoder's image size."""
    spec, mean = tapped.encoder.spec, tapped.encoder.mean
    image = mean.new_zeros(1, spec.in_channels, spec.image_size, spec.image_size)
    with undisturbed(tapped), torch.no_grad():
        _, maps = tapped(image)
    return {
        tap: (m.shape[1], m.shape[2], m.shape[3]) for tap, m in zip(tapped.taps, maps, strict=True)
    }


def attention_free_taps(tapped: TappedEncoder) -> tuple[str, ...]:
    """Taps whose map has one position: normalized, its attention map is always 1."""
    return tuple(tap for tap, (_, h, w) in tap_shapes(tapped).items() if h * w == 1)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Runs ``module`` in evaluation mode; puts modes, buffers and random states back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {b.device.index for b in (*module.parameters(), *module.buffers()) if b.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


@contextmanager
def _hooked(module: nn.Module, catch: Callable[[Any], Tensor | None]) -> Iterator[None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        return catch(output)

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _prefix_tokens(backbone: nn.Module) -> int:
    """Class and register tokens before the patch tokens: timm counts them, torchvision has one."""
    count = getattr(backbone, "num_prefix_tokens", None)
    return count if isinstance(count, int) else int(_class_token(backbone))


def _class_token(backbone: nn.Module) -> bool:
    return any(
        isinstance(getattr(backbone, name, None), Tensor) for name in ("cls_token", "class_token")
    )


def _summary(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:12], "..."])
