"""Checks that arrays are the ones that were saved: fingerprints, digests and finite values.

Devices compute a fingerprint in one pass over their own parts of the arrays, so that a run on any
number of hosts can do it at every save. When a checkpoint is read, the same value is computed from
numpy arrays. A digest is the SHA-256 of parameters on the host.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.errors import UserError

_STRIDE = 0x9E3779B1  # odd: spreads positions over 32 bits
_CHUNK = 1 << 16  # values hashed at a time on the host: they stay in the cache
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def digest(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all parameters: their paths in order, shapes and float32 values."""
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        sha.update(f"{'/'.join(path)}{np.shape(leaf)}".encode())
        sha.update(np.ascontiguousarray(leaf, dtype="<f4").data)
    return sha.hexdigest()


def fingerprints(**items: Any) -> dict[str, str]:
    """Returns the fingerprint of each item of a checkpoint; an item that is None has none.

    A fingerprint is 16 hexadecimal digits that depend on every path, shape, type and bit of a tree.
    Each value is hashed together with its position, and the hashes of an array are summed modulo
    2**32, twice. The hash is one-to-one at each position, so that a change of one value always
    changes the sums. They are the same for jax arrays, however they are sharded, and numpy arrays.

    For arrays that are sharded over several processes, every process must call this.

    Args:
        **items: trees of arrays of at most 4 bytes a value.
    """
    items = {name: tree for name, tree in items.items() if tree is not None}
    leaves = [
        (name, jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for name, tree in items.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    lines: dict[str, list[str]] = {name: [] for name in items}
    for (name, path, leaf), sums in zip(leaves, _sums([x for _, _, x in leaves]), strict=True):
        lines[name].append(f"{path} {leaf.dtype} {leaf.shape} {sums[0]:08x}{sums[1]:08x}\n")
    return {
        name: hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]
        for name, found in lines.items()
    }


def check_finite(params: Mapping[str, Any], name: str) -> None:
    """Checks that parameters hold neither NaN nor infinity.

    Raises:
        UserError: names the weights, and the first of the parameters that do.
    """
    bad = ["/".join(path) for path, x in flatten_dict(params).items() if not np.isfinite(x).all()]
    if bad:
        raise UserError(
            f"{name} holds values that are not finite (NaN or infinity) in {len(bad)} parameters, "
            f"such as {bad[0]}: use another checkpoint, or ask for these values with "
            "allow_non_finite=True (--allow-non-finite)"
        )


def _sums(arrays: list[Any]) -> list[tuple[int, int]]:
    """Returns the two sums of each array, computed where the arrays are."""
    if not any(isinstance(array, jax.Array) for array in arrays):
        return [_numpy_sums(np.asarray(array)) for array in arrays]
    return [tuple(sums) for sums in np.asarray(_compiled_sums(_mesh(arrays))(arrays)).tolist()]


def _mesh(arrays: list[Any]) -> Any:
    """Returns the mesh that the arrays are sharded over, None for arrays of one device."""
    for array in arrays:
        if isinstance(sharding := getattr(array, "sharding", None), NamedSharding):
            return sharding.mesh
    return None


@functools.lru_cache(maxsize=4)
def _compiled_sums(mesh: Any) -> Any:
    """Returns the jitted sums of a list of arrays; every process of the mesh gets all of them."""
    replicated = NamedSharding(mesh, P()) if mesh is not None else None
    return jax.jit(lambda arrays: jnp.stack(list(map(_jax_sums, arrays))), out_shardings=replicated)


@jax.jit  # so that it is traced once for each shape
def _jax_sums(array: jax.Array) -> jax.Array:
    """Returns the two sums of an array, uint32 [2]. Positions are those in the whole array."""
    array = jnp.asarray(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position += index * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    hashes = _hash(bits + position * np.uint32(_STRIDE))
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in hashes])


def _numpy_sums(array: np.ndarray) -> tuple[int, int]:
    """Returns the sums that `_jax_sums` computes, on the host."""
    bits = np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.dtype.itemsize])
    offsets = np.arange(min(_CHUNK, bits.size), dtype=np.uint32) * np.uint32(_STRIDE)
    total = np.zeros(2, np.uint64)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK].astype(np.uint32)
        shift = np.uint32(start * _STRIDE % 2**32)
        hashes = _hash(chunk + offsets[: chunk.size] + shift)
        total += np.array([x.sum(dtype=np.uint64) for x in hashes])
    first, second = (total % 2**32).tolist()
    return first, second


def _hash(x: Any) -> tuple[Any, Any]:
    """Returns two one-to-one hashes of uint32 numbers: MurmurHash3's last steps, and two more."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    x = x ^ (x >> np.uint32(16))
    y = (x ^ (x >> np.uint32(15))) * np.uint32(0x27D4EB2F)
    return x, y ^ (y >> np.uint32(13))
