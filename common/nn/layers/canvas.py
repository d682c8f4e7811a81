"""Photos of several sizes on canvases of one size: content top left, the rest is padding.

Shape legend: B images, H W height and width of the canvas, C channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped, UInt8


def content(shape: tuple[int, ...], image_size: Float[Array, "B 2"]) -> Bool[Array, "B H W"]:
    """Which pixels of canvases of `shape` (H, W) hold content, `image_size` height and width."""
    height, width = shape
    return (jnp.arange(height)[:, None] < image_size[:, None, None, 0]) & (
        jnp.arange(width)[None, :] < image_size[:, None, None, 1]
    )


def standardise(
    images: UInt8[Array, "B H W 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "B H W 3"]:
    """(pixel - mean) / std."""
    # Multiplying by 1 / std: a division a pixel is what the TPU's vector unit is slow at.
    scale = 1.0 / jnp.asarray(std, jnp.float32)
    return ((images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) * scale).astype(dtype)


def normalise(
    images: UInt8[Array, "B H W 3"],
    image_size: Float[Array, "B 2"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jnp.dtype,
) -> Float[Array, "B H W 3"]:
    """(pixel - mean) / std inside the content, exactly 0 in the padding."""
    inside = content(images.shape[1:3], image_size)
    return jnp.where(inside[..., None], standardise(images, mean, std), 0.0).astype(dtype)


def mirror(
    images: Shaped[Array, "B H W *C"], widths: Float[Array, " B"]
) -> Shaped[Array, "B H W *C"]:
    """Mirrors the content, `widths` pixels wide, left to right; it stays at the top left."""

    def one(image, width):
        behind = ((0, 0), (0, image.shape[1])) + ((0, 0),) * (image.ndim - 2)
        start = image.shape[1] - width.astype(jnp.int32)
        return jax.lax.dynamic_slice_in_dim(
            jnp.pad(image[:, ::-1], behind), start, image.shape[1], axis=1
        )

    return jax.vmap(one)(images, widths)
